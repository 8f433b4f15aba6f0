"""Reshard between layouts drawn at random: proven, right to the bit, and of as many bytes as the formula says."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import LayoutMismatch, UsageError
from collectives.schedule import Schedule
from collectives.verify import verify
from parallel.boxing import boxing
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Split
from parallel.resharding import Reshard, reshard
from tests.collectives.lockstep import lockstep
from tests.parallel import reshard_programs as programs
from tests.parallel.layouts import assemble, deal, draw_layout, draw_mesh, draw_shape

B, P = Broadcast(), Partial()


def performed(change: Reshard, shards: dict[int, Tensor]) -> dict[int, Tensor]:
    """What the ranks hold after the schedule was run in one process."""
    schedule = change.schedule
    nothing = torch.empty(0, dtype=torch.float64)
    buffers = np.full((schedule.world, schedule.count), np.nan)
    for rank in range(schedule.world):
        given, at = change.source(rank, change.held(rank, shards.get(rank, nothing)), torch.float64).numpy(), 0
        for start, stop in schedule.held(rank):
            buffers[rank, start:stop] = given[at : at + stop - start]
            at += stop - start
        assert at == len(given)
    after = torch.from_numpy(lockstep(schedule, buffers))
    return {rank: change.result(rank, wanted(schedule, after[rank], rank)) for rank in change.after.mesh.ranks}


def wanted(schedule: Schedule, buffer: Tensor, rank: int) -> Tensor:
    return torch.cat([*(buffer[start:stop] for start, stop in schedule.wanted(rank)), buffer[:0]])


def sent(schedule: Schedule) -> int:
    steps = [schedule.step(index) for index in range(len(schedule))]
    return sum(int((step.stop - step.start).sum()) for step in steps)


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_becomes_any_other(seed: int) -> None:
    chance, kinds = random.Random(seed), Counter[str]()
    for _ in range(250):
        world, shape = chance.randint(1, 8), draw_shape(chance)
        mesh = draw_mesh(chance, world)
        before = draw_layout(chance, mesh, len(shape))
        after = draw_layout(chance, mesh if chance.random() < 0.6 else draw_mesh(chance, world), len(shape))
        whole = torch.from_numpy(np.random.default_rng(seed).integers(-99, 99, shape).astype(np.float64))
        change, cost = reshard(before, after, shape, world), boxing(before, after, shape)
        told = f"{before} to {after} of {shape}"
        verify(change.schedule)
        assert (sent(change.schedule), len(change.schedule)) == (cost.elements, cost.steps), told
        assert change.local == (cost.elements == 0)
        shards = deal(whole, before, chance)
        kept = {rank: shard.clone() for rank, shard in shards.items()}
        assert torch.equal(assemble(performed(change, shards), after, shape), whole), told
        assert all(torch.equal(shards[rank], kept[rank]) for rank in kept), "an input was changed"
        kinds[cost.kind] += 1
    assert len(kinds) == 7, kinds


@pytest.mark.parametrize("op", ["min", "max", "prod", "avg"])
def test_other_reductions_combine_and_fill_with_what_changes_nothing(op: str) -> None:
    mesh = Mesh.of(x=3)
    partial, terms = Layout(mesh, (Partial(op),)), torch.tensor([[3.0, -1.0], [2.0, 5.0], [4.0, -2.0]])
    expected = {
        "min": [2.0, -2.0],
        "max": [4.0, 5.0],
        "prod": [24.0, 10.0],
        "avg": [3.0, 2.0 / 3.0],
    }[op]
    with programs.trio() as group:
        found = group.run(programs.reduce_terms, op=op, terms=terms.tolist())
    assert found == [expected] * 3
    assert torch.equal(performed(reshard(partial, partial, (2,)), dict(enumerate(terms)))[0], terms[0])
    change = reshard(Layout(mesh, (Split(0),)), partial, (2,))
    assert change.local == (op == "prod")
    halves = {0: torch.tensor([3.0]), 1: torch.tensor([-1.0]), 2: torch.zeros(0)}
    spread = torch.stack([*performed(change, halves).values()])
    combined = {"min": spread.amin(0), "max": spread.amax(0), "prod": spread.prod(0), "avg": spread.mean(0)}[op]
    assert combined.tolist() == [3.0, -1.0]


@pytest.mark.parametrize("transport", ["gloo", "sockets", "shm"])
def test_real_processes_send_what_the_formula_says(transport: str) -> None:
    with programs.quartet(transport) as group:
        for cases in group.run(programs.random_changes, seed=5, count=40):
            assert cases["right"] == 40
        counted = group.run(programs.random_changes, seed=6, count=25)
        assert sum(member["sent"] for member in counted) == counted[0]["expected"] > 0
        table = group.run(programs.table_of_the_paper)
        assert sum(member["sent"] for member in table) == table[0]["expected"] > 0


def test_what_does_not_fit_is_refused() -> None:
    split, whole = Layout(Mesh.of(x=2), (Split(0),)), Layout(Mesh.of(x=2), (B,))
    with pytest.raises(LayoutMismatch, match=r"rank 0 holds a shard of shape \[3, 2\].*this one is \[2, 2\]"):
        reshard(split, whole, (6, 2)).held(0, torch.zeros(2, 2))
    with pytest.raises(UsageError, match="name rank 1, which a world of 1 lacks"):
        reshard(split, whole, (6, 2), world=1)
    with pytest.raises(UsageError, match="world of 2, but there are 1"):
        reshard(split, whole, (6, 2)).run(Communicator.solo(), torch.zeros(3, 2))


def test_nothing_is_copied_where_memory_is_as_it_should_be() -> None:
    mesh, shard = Mesh.of(x=2), torch.arange(12.0).view(3, 4)
    for before, after in (((P,), (B,)), ((P,), (Split(0),)), ((Split(0),), (B,)), ((P,), (Flat(),))):
        change = reshard(Layout(mesh, before), Layout(mesh, after), (3 if before == (P,) else 6, 4))
        source = change.source(0, change.held(0, shard), shard.dtype)
        assert source.data_ptr() == shard.data_ptr()
        assert source.tolist() == shard.flatten().tolist()
