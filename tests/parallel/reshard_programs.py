"""What the members of a group do in the tests of reshard."""

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch

from collectives.communicator import Communicator
from parallel.boxing import boxing
from parallel.layout import Broadcast, Layout, Mesh, Partial, Placement, Split
from parallel.resharding import reshard
from tests.harness.residents import Residents
from tests.parallel.layouts import cut, deal, draw_layout, draw_mesh, draw_shape, mesh_of

NOTHING = torch.empty(0, dtype=torch.float64)


@contextlib.contextmanager
def quartet(transport: str) -> Iterator[Residents]:
    with Residents(4, transport=transport) as group:
        yield group


@contextlib.contextmanager
def trio() -> Iterator[Residents]:
    with Residents(3) as group:
        yield group


def random_changes(comm: Communicator, seed: int, count: int) -> dict[str, Any]:
    """Change layouts drawn at random, to ones that sum nothing so that each rank knows what it must have."""
    chance, right, expected = random.Random(seed), 0, 0
    before_all = comm.meter.total
    for _ in range(count):
        shape = draw_shape(chance)
        mesh = draw_mesh(chance, comm.size)
        before = draw_layout(chance, mesh, len(shape))
        after = draw_layout(chance, mesh if chance.random() < 0.5 else draw_mesh(chance, comm.size), len(shape))
        placed = tuple[Placement, ...](Broadcast() if isinstance(p, Partial) else p for p in after.placements)
        after = Layout(after.mesh, placed)
        numbers = torch.Generator().manual_seed(chance.randrange(2**31))
        whole = torch.randint(-99, 99, shape, generator=numbers).to(torch.float64)
        shards = deal(whole, before, chance)
        found = reshard(before, after, shape, comm.size).run(comm, shards.get(comm.rank, NOTHING))
        member = comm.rank in after.mesh.ranks
        right += torch.equal(found, cut(whole, after.shard(shape, comm.rank)) if member else NOTHING)
        expected += boxing(before, after, shape).elements * 8
    return {"right": right, "expected": expected, "sent": comm.meter.total - before_all}


def table_of_the_paper(comm: Communicator) -> dict[str, int]:
    """Every change between placements of a mesh of one axis and of two, for large tensors and small ones."""
    expected, before_all = 0, comm.meter.total
    for mesh in (mesh_of(4), mesh_of(2, 2)):
        kinds: list[Placement] = [Split(0), Split(1), Broadcast(), Partial()]
        layouts = [Layout(mesh, placed) for placed in itertools.product(kinds, repeat=len(mesh.axes))]
        for a, b in random.Random(3).sample(list(itertools.permutations(layouts, 2)), 12):
            for shape in ((96, 128), (5, 7)):
                mine = torch.ones(a.shard(shape, comm.rank).shape, dtype=torch.float32)
                reshard(a, b, shape).run(comm, mine)
                expected += boxing(a, b, shape).elements * 4
    return {"expected": expected, "sent": comm.meter.total - before_all}


def reduce_terms(comm: Communicator, op: str, terms: list[list[float]]) -> list[float]:
    mesh = Mesh.of(x=comm.size)
    change = reshard(Layout(mesh, (Partial(op),)), Layout(mesh, (Broadcast(),)), (len(terms[0]),))
    result: list[float] = change.run(comm, torch.tensor(terms[comm.rank], dtype=torch.float64)).tolist()
    return result
