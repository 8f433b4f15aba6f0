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

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import LayoutMismatch, UsageError
from collectives.region import Ranges, split
from collectives.schedule import Schedule, Step
from parallel.cells import Cell, Nearness, Ranks, Sum, cells, nearness, reduction
from parallel.layout import Layout
from parallel.packing import Part, gather, joined, parts, scatter

_Row = tuple[int, int, int, int, bool]


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
class Reshard:
    """A change of layout of tensors of one shape. Make one with `reshard`.

    Attributes:
        before, after: the layouts; their ranks are those of the communicator.
        shape: of the whole tensor.
        schedule: what is sent; its work buffer has the flows one behind the other.
        op: how terms combine.
        terms: by how many an average is to be divided; else 1.

    """

    before: Layout
    after: Layout
    shape: tuple[int, ...]
    schedule: Schedule = field(repr=False)
    op: str
    terms: int
    flows: tuple[Flow, ...] = field(repr=False)
    _places: dict[tuple[int, bool], tuple[Part, ...]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def local(self) -> bool:
        """Whether nothing is sent."""
        return not len(self.schedule)

    @cached_property
    def elements(self) -> int:
        """Elements that all ranks send together."""
        steps = map(self.schedule.step, range(len(self.schedule)))
        return sum(int((step.stop - step.start).sum()) for step in steps)

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
        rank = comm.rank
        held = self.source(rank, shard)
        if not self.local:
            outcome = comm.redistribute(self.schedule, held, op="sum" if self.op == "avg" else self.op)
            assert outcome.result is not None
            held = outcome.result
        return self.result(rank, held)

    def source(self, rank: int, shard: Tensor) -> Tensor:
        """What a rank gives to the schedule, flat: the elements of the ranges that it holds, in order."""
        expected = _shape(self.before, self.shape, rank)
        if tuple(shard.shape) != expected:
            raise LayoutMismatch(
                f"rank {rank} holds a shard of shape {list(expected)} of a tensor of shape {list(self.shape)} that "
                f"lives on {self.before}; this one is {list(shard.shape)}"
            )
        return gather(shard.detach(), self._parts(rank, False))

    def result(self, rank: int, values: Tensor) -> Tensor:
        """A rank's shard, made of the elements of the ranges that it wants, flat and in order."""
        if self.terms > 1:
            values = values / self.terms
        shape = _shape(self.after, self.shape, rank)
        return scatter(values, self._parts(rank, True), shape, identity(self.op, values.dtype))

    def _parts(self, rank: int, after: bool) -> tuple[Part, ...]:
        known = self._places.get((rank, after))
        if known is None:
            found = list[Part]()
            for flow in self.flows:
                if rank in (flow.wanted if after else flow.terms):
                    mine, other = (flow.cell.after, flow.cell.before)[:: 1 if after else -1]
                    found += parts(mine, other, self.shape, flow.start, flow.stop)
            known = self._places[rank, after] = joined(found)
        return known


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
    op = reduction(before, after)
    needed = 1 + max(before.mesh.ranks + after.mesh.ranks)
    if world and world < needed:
        raise UsageError(f"the layouts {before} and {after} name rank {needed - 1}, which a world of {world} lacks")
    near = nearness(before, after)
    flows = tuple(
        flow for cell in cells(before, after, shape) for value in cell.sums for flow in _flows(cell, value, near)
    )
    terms = max((len(value.terms) for flow in flows for value in flow.cell.sums), default=1) if op == "avg" else 1
    schedule = _schedule(flows, world or needed)
    return Reshard(before, after, shape, schedule, op, terms, flows)


def identity(op: str, dtype: torch.dtype) -> float:
    """What leaves any value as it is when combined with it."""
    if op in ("sum", "avg"):
        return 0
    if op == "prod":
        return 1
    if dtype.is_floating_point:
        return float("inf") if op == "min" else -float("inf")
    limits = torch.iinfo(dtype)
    return limits.max if op == "min" else limits.min


def _shape(layout: Layout, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return layout.shard(shape, rank).shape if rank in layout.mesh.ranks else (0,)


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


def _schedule(flows: tuple[Flow, ...], world: int) -> Schedule:
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
