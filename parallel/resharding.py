"""From one layout of a tensor to another: which bytes move, as a schedule, and what lies where before and after.

    step = reshard(before, after, shape)
    after_shard = step.run(comm, before_shard)

Any two layouts will do: on one mesh or two, of disjoint or overlapping ranks, cut in boxes or flat, uneven, partial.
The elements sent are those of `boxing`. Called by `execute` between the operations of a plan, by `carry` when members
are lost, and by whoever moves state between meshes.

The algorithm is the same for all, a direct exchange. Elements that are whole somewhere go from there to those that lack
them, each from the nearest. Sums are made by owners: those that want them and have a term share each cell out among
themselves, get the other terms, and send the sum to the others that want it. So every rank that wants an element gets
the same bits.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, groupby
from typing import TypeAlias

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import LayoutMismatch, UsageError
from collectives.region import Ranges, Region, split
from collectives.schedule import Schedule, Step
from parallel.cells import Cell, Nearness, Ranks, Reduction, Sum, attainable, cells, nearness, reduction
from parallel.layout import Layout, Shard
from parallel.packing import Part, Span, gather, joined, parts, scatter

_Row: TypeAlias = tuple[int, int, int, int, bool]
_Places: TypeAlias = tuple[tuple[Shard, tuple[Part, ...]], ...]
_Target: TypeAlias = tuple[tuple[Part, ...], tuple[int, ...]]
"""Where what comes is put, and the shape of the shard."""
_SUMS = Reduction("sum", "sum")


@dataclass(frozen=True, slots=True)
class Flow:
    """Elements `[start, stop)` of a cell that go the same way: a range of the schedule's work buffer of its own.

    Attributes:
        terms: the ranks that contribute, one for each term; the first is the one that adds up.
        wanted: the ranks that want the value.

    """

    cell: Cell
    start: int
    stop: int
    terms: Ranks
    wanted: Ranks

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Change:
    """How tensors of one shape come to a layout from wherever they are.

    Attributes:
        after: the layout, with replicas for partial values where these are as good (`attainable`); its ranks are those
            of the communicator.
        shape: of the whole tensor.
        flows: what goes where.
        schedule: what is sent; its work buffer has the flows one behind the other.
        op: how terms combine before and after.
        terms: by how many an average is to be divided; else 1.

    """

    after: Layout
    shape: tuple[int, ...]
    flows: tuple[Flow, ...] = field(repr=False)
    schedule: Schedule = field(repr=False)
    op: Reduction = _SUMS
    terms: int = 1
    _sources: dict[int, tuple[tuple[Shard, tuple[Part, ...]], ...]] = field(
        default_factory=dict, init=False, repr=False
    )
    _targets: dict[int, _Target] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def local(self) -> bool:
        """Whether nothing is sent."""
        return not len(self.schedule)

    @property
    def combining(self) -> str:
        """The reduction that the schedule is run with."""
        return "sum" if self.op.before == "avg" else self.op.before

    def wanted(self, rank: int) -> int:
        """How many elements the schedule gives to a rank."""
        return sum(stop - start for start, stop in self.schedule.wanted(rank))

    def move(self, comm: Communicator, held: Mapping[Shard, Tensor], dtype: torch.dtype) -> Tensor:
        """Bring a tensor to `after`; every rank of the communicator calls it, with the shards that it holds.

        See `Reshard.run`. `dtype` is that of all shards.
        """
        values = self.source(comm.rank, held, dtype)
        if not self.local:
            outcome = comm.redistribute(self.schedule, values, op=self.combining)
            assert outcome.result is not None
            values = outcome.result
        return self.result(comm.rank, values)

    def source(self, rank: int, held: Mapping[Shard, Tensor], dtype: torch.dtype) -> Tensor:
        """What a rank gives to the schedule, flat: the elements of the ranges that it holds, in order."""
        found = [gather(held[shard].detach(), places) for shard, places in self._source_parts(rank)]
        return found[0] if len(found) == 1 else torch.cat([*found, torch.empty(0, dtype=dtype)])

    def result(self, rank: int, values: Tensor) -> Tensor:
        """A rank's shard, made of the elements of the ranges that it wants, flat and in order."""
        if self.terms > 1:
            values = values / self.terms
        places, shape = self._target(rank)
        return scatter(values, places, shape, float(self.op.after == "prod"))

    def _source_parts(self, rank: int) -> _Places:
        known = self._sources.get(rank)
        if known is None:
            mine = [flow for flow in self.flows if rank in flow.terms]
            known = self._sources[rank] = tuple(
                (shard, joined(chain.from_iterable(self._places(flow, shard) for flow in flows)))
                for shard, flows in groupby(mine, key=lambda flow: flow.cell.before)
            )
        return known

    def _target(self, rank: int) -> _Target:
        known = self._targets.get(rank)
        if known is None:
            mine = [flow for flow in self.flows if rank in flow.wanted]
            places = chain.from_iterable(self._places(flow, flow.cell.after) for flow in mine)
            shape = self.after.shard(self.shape, rank).shape if rank in self.after.mesh.ranks else (0,)
            known = self._targets[rank] = joined(places), shape
        return known

    def _places(self, flow: Flow, shard: Shard) -> tuple[Part, ...]:
        other = flow.cell.after if shard is flow.cell.before else flow.cell.before
        return parts(shard, other, self.shape, flow.start, flow.stop)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reshard(Change):
    """A change of layout of tensors of one shape, from `before`. Make one with `reshard`."""

    before: Layout
    _held: dict[int, tuple[Shard, bool]] = field(default_factory=dict, init=False, repr=False)

    def run(self, comm: Communicator, shard: Tensor) -> Tensor:
        """Bring a tensor from `before` to `after`; every rank of the communicator calls it.

        Args:
            comm: of as many ranks as `schedule.world`, unless nothing is sent.
            shard: what this rank holds, in the shape of its `Shard`; an empty tensor of the same dtype as the others'
                where it holds nothing. It is not changed, but the result may be a view of it.

        Returns: what it holds afterwards, in the shape of its shard; an empty tensor where that is nothing.

        Raises:
            LayoutMismatch: `shard` has another shape.
            UsageError: the communicator has too few ranks or too many.
            MemberLost: as for `Communicator.redistribute`.

        """
        held = self.held(comm.rank, shard)
        return shard if self._held[comm.rank][1] else self.move(comm, held, shard.dtype)

    def held(self, rank: int, tensor: Tensor) -> dict[Shard, Tensor]:
        """What a rank holds, for `move`. Raises `LayoutMismatch` if it has another shape."""
        known = self._held.get(rank)
        if known is None:
            shard = self.before.shard(self.shape, rank) if rank in self.before.mesh.ranks else _NOTHING
            known = self._held[rank] = shard, self._stays(rank, shard)
        shard = known[0]
        if tuple(tensor.shape) != shard.shape:
            raise LayoutMismatch(
                f"rank {rank} holds a shard of shape {list(shard.shape)} of a tensor of shape {list(self.shape)} that "
                f"lives on {self.before}; this one is {list(tensor.shape)}"
            )
        return {shard: tensor}

    def _stays(self, rank: int, shard: Shard) -> bool:
        """Whether a rank is left with just what it holds, and nobody else wants any of it."""
        everything = (Span(0, shard.size),)
        same = self._source_parts(rank) == ((shard, everything),) and self._target(rank) == (everything, shard.shape)
        return self.local and self.terms == 1 and same


_NOTHING = Shard.of(Region.flat(0, 0))


@lru_cache(maxsize=4096)
def reshard(before: Layout, after: Layout, shape: tuple[int, ...], world: int = 0) -> Reshard:
    """How tensors of this shape come from one layout to another; remembered.

    Args:
        before: where the tensor is.
        after: where it shall be.
        shape: of the whole tensor.
        world: size of the communicator; 0: as many ranks as the layouts name.

    Raises:
        UsageError: a layout does not suit the shape or the world, or has partial values of several kinds.

    """
    after = attainable(before, after)
    op = reduction(before, after)
    needed = 1 + max(before.mesh.ranks + after.mesh.ranks)
    if world and world < needed:
        raise UsageError(f"the layouts {before} and {after} name rank {needed - 1}, which a world of {world} lacks")
    flows = flows_of(cells(before, after, shape), nearness(before, after))
    terms = (
        max((len(value.terms) for flow in flows for value in flow.cell.sums), default=1) if op.before == "avg" else 1
    )
    return Reshard(after, shape, flows, schedule_of(flows, world or needed), op, terms, before=before)


def flows_of(made: Iterable[Cell], near: Nearness) -> tuple[Flow, ...]:
    """What goes where, for these cells."""
    return tuple(flow for cell in made for value in cell.sums for flow in _flows(cell, value, near))


def _flows(cell: Cell, value: Sum, near: Nearness) -> Iterator[Flow]:
    """How the elements of a cell come to those that want one of its sums."""
    if len(value.terms) > 1:
        owners = value.owners
        for number, (owner, (start, stop)) in enumerate(zip(owners, split(cell.size, len(owners)), strict=True)):
            if start < stop:
                chosen = (_nearest(ranks, owner, number, near) for ranks in value.terms)
                terms = sorted(chosen, key=lambda rank: rank != owner)
                yield Flow(cell, start, stop, tuple(terms), value.wanted)
        return
    to: dict[int, list[int]] = {}
    for number, rank in enumerate(value.wanted):
        to.setdefault(_nearest(value.terms[0], rank, number, near), []).append(rank)
    for source, ranks in to.items():
        yield Flow(cell, 0, cell.size, (source,), tuple(ranks))


def _nearest(ranks: Ranks, other: int, number: int, near: Nearness) -> int:
    """The rank itself if it is among them, else one of those that are nearest, another for each number."""
    if other in ranks:
        return other
    best = max(near(rank, other) for rank in ranks)
    nearest = [rank for rank in ranks if near(rank, other) == best]
    return nearest[number % len(nearest)]


def schedule_of(flows: tuple[Flow, ...], world: int) -> Schedule:
    """One step for what comes from those that hold it, and one for sums that others want too."""
    first, second = list[_Row](), list[_Row]()
    held, wanted = [list[tuple[int, int]]() for _ in range(world)], [list[tuple[int, int]]() for _ in range(world)]
    start = 0
    for flow in flows:
        stop = start + flow.size
        owner, *others = flow.terms
        first += [(rank, owner, start, stop, True) for rank in others]
        rows = second if others else first
        rows += [(owner, rank, start, stop, False) for rank in flow.wanted if rank != owner]
        for ranks, ranges in ((flow.terms, held), (flow.wanted, wanted)):
            for rank in ranks:
                ranges[rank].append((start, stop))
        start = stop
    steps = [
        Step.of(sorted(rows, key=lambda row: ((row[0] - row[1]) % world, row))) for rows in (first, second) if rows
    ]
    return Schedule.from_steps("reshard", "direct", world, start, steps, _merged(held), _merged(wanted))


def _merged(ranges: list[list[tuple[int, int]]]) -> list[Ranges]:
    """The same with neighbours as one, for each rank."""
    made = []
    for mine in ranges:
        out: list[tuple[int, int]] = []
        for start, stop in mine:
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], stop)
            else:
                out.append((start, stop))
        made.append(tuple(out))
    return made
