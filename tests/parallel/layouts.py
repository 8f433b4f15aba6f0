"""Layouts drawn at random, whole tensors dealt out by them, and put together again."""

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Shard, Split

GRIDS = [(), (1,), (2,), (3,), (4,), (5,), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (2, 2, 2)]


def mesh_of(*grid: int, ranks: tuple[int, ...] = ()) -> Mesh:
    return Mesh(tuple((f"axis{number}", size) for number, size in enumerate(grid)), ranks)


def draw_shape(chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.choice([0, 1, 2, 3, 5, 6, 7, 8]) for _ in range(chance.randint(0, 3)))


def draw_mesh(chance: random.Random, world: int) -> Mesh:
    """On any ranks of the world, in any order."""
    grid = chance.choice([grid for grid in GRIDS if mesh_of(*grid).size <= world])
    return mesh_of(*grid, ranks=tuple(chance.sample(range(world), mesh_of(*grid).size)))


def draw_layout(chance: random.Random, mesh: Mesh, dims: int, op: str = "sum") -> Layout:
    kinds: list[Placement] = [*map(Split, range(dims)), Broadcast(), Partial(op), Flat()]
    return Layout(mesh, tuple(chance.choice(kinds) for _ in mesh.axes))


def cut(whole: Tensor, shard: Shard) -> Tensor:
    """The elements of a shard."""
    flat = whole.reshape(-1)
    runs = [flat[start:stop] for start, stop in shard.runs(tuple(whole.shape))]
    return torch.cat([*runs, flat[:0]]).view(shard.shape)


def deal(whole: Tensor, layout: Layout, chance: random.Random) -> dict[int, Tensor]:
    """What each rank holds of a tensor of whole numbers; terms of sums are drawn at random."""
    terms = _terms(layout, chance, whole)
    shape = tuple(whole.shape)
    return {rank: cut(terms[_term(layout, rank)], layout.shard(shape, rank)) for rank in layout.mesh.ranks}


def assemble(shards: Mapping[int, Tensor], layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor, after a check that replicas are equal to the bit and all of it is there."""
    sums: dict[Shard, dict[tuple[int, ...], Tensor]] = {}
    for rank, mine in shards.items():
        shard = layout.shard(shape, rank)
        assert tuple(mine.shape) == shard.shape
        known = sums.setdefault(shard, {}).setdefault(_term(layout, rank), mine)
        assert torch.equal(known, mine), f"rank {rank} holds another replica"
    whole = torch.full((torch.Size(shape).numel(),), float("nan"), dtype=torch.float64)
    for shard, terms in sums.items():
        values, at = torch.stack(list(terms.values())).sum(0).reshape(-1), 0
        for start, stop in shard.runs(shape):
            whole[start:stop] = values[at : at + stop - start]
            at += stop - start
    return whole.view(shape)


def _terms(layout: Layout, chance: random.Random, whole: Tensor) -> dict[tuple[int, ...], Tensor]:
    places = sorted({_term(layout, rank) for rank in layout.mesh.ranks})
    noise = torch.Generator().manual_seed(chance.randrange(2**31))
    terms = {p: torch.randint(-99, 99, whole.shape, generator=noise).to(whole.dtype) for p in places[1:]}
    terms[places[0]] = whole - sum(terms.values(), torch.zeros_like(whole))
    return terms


def _term(layout: Layout, rank: int) -> tuple[int, ...]:
    place = layout.mesh.place(rank)
    return tuple(at for at, placement in zip(place, layout.placements, strict=True) if isinstance(placement, Partial))
