"""Chunks that travel round a ring of ranks: what the ring and the bidirectional ring share.

The buffer is cut into parts and rank `r` owns part `r`, its chunk. Going round in direction `d` (+1 or -1),
rank `r` reduces what it gets and passes it on to rank `r + d`, in turn `t` the chunk `r - d - d * t`; after `world - 1`
turns the last one that it got is its own, fully reduced: a reduce-scatter. Passing chunks on in the same way, but
overwriting instead of reducing, is an all-gather. Each chunk is reduced along one path, so the order of reduction is
fixed, and every rank gets a copy of the same bits.

A lane is a direction and the part of each chunk that takes it. The ring has one lane, for whole chunks.

The ring goes through the ranks in the given order, so that neighbours in it can be near each other. The functions below
number ranks by their position in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from collectives.algorithms.parts import Parts, Span, checked_root, everything, only, own, parts_of
from collectives.algorithms.strand import NOBODY, Strand, finishing, lifted, schedule
from collectives.errors import UsageError
from collectives.region import Ints
from collectives.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Lane:
    """A direction round the ring and the part of a range (start, stop) that takes it."""

    direction: int
    part: Callable[[Ints, Ints], Span]


Lanes = tuple[Lane, ...]
Lengths = tuple[int, ...] | None
Order = tuple[int, ...] | None


def all_reduce(algorithm: str, world: int, count: int, finish: bool, order: Order, lanes: Lanes) -> Schedule:
    """Reduce-scatter, then finish if asked, then all-gather."""
    parts = parts_of(count, world, None)
    first = world - 1 + finish
    strands = _reducing(lanes, world, parts, order) + _gathering(lanes, world, parts, order, first)
    end = finishing(finish, world - 1, parts)
    whole = everything(count)
    return schedule("all_reduce", algorithm, world, count, strands, held=whole, wanted=whole, finishes=end)


def reduce_scatter(
    algorithm: str, world: int, count: int, finish: bool, counts: Lengths, order: Order, lanes: Lanes
) -> Schedule:
    """Rank `r` ends with part `r` reduced, and finished if asked."""
    parts = parts_of(count, world, counts)
    strands = _reducing(lanes, world, parts, order)
    end = finishing(finish, world - 1, parts)
    whole = everything(count)
    return schedule("reduce_scatter", algorithm, world, count, strands, held=whole, wanted=own(parts), finishes=end)


def all_gather(algorithm: str, world: int, count: int, counts: Lengths, order: Order, lanes: Lanes) -> Schedule:
    """Rank `r` begins with part `r`; all end with all."""
    parts = parts_of(count, world, counts)
    strands = _gathering(lanes, world, parts, order, 0)
    return schedule("all_gather", algorithm, world, count, strands, held=own(parts), wanted=everything(count))


def broadcast(algorithm: str, world: int, count: int, root: int, order: Order, lanes: Lanes) -> Schedule:
    """A chain from the root: in turn `t` the rank at distance `t` passes the buffer on.

    Raises:
        UsageError: `root` is not a rank.

    """
    at = _checked(order, world).index(checked_root("broadcast", root, world))
    strands = tuple(_placed(_chain(lane, world, count, at), world, order) for lane in lanes)
    return schedule("broadcast", algorithm, world, count, strands, held=only(root, count), wanted=everything(count))


def _reducing(lanes: Lanes, world: int, parts: Parts, order: Order) -> tuple[Strand, ...]:
    chunk = _by_position(parts, order)

    def strand(lane: Lane) -> Strand:
        def span(turn: Ints, position: Ints) -> Span:
            return lane.part(*chunk((position - lane.direction * (turn + 1)) % world))

        return _placed(_round(lane, world, 0, span, combine=True), world, order)

    return tuple(map(strand, lanes))


def _gathering(lanes: Lanes, world: int, parts: Parts, order: Order, first: int) -> tuple[Strand, ...]:
    chunk = _by_position(parts, order)

    def strand(lane: Lane) -> Strand:
        def span(turn: Ints, position: Ints) -> Span:
            return lane.part(*chunk((position - lane.direction * turn) % world))

        return _placed(_round(lane, world, first, span, combine=False), world, order)

    return tuple(map(strand, lanes))


def _round(lane: Lane, world: int, first: int, span: Callable[[Ints, Ints], Span], combine: bool) -> Strand:
    return Strand(
        steps=range(first, first + world - 1),
        target=lambda turn, position: (position + lane.direction) % world,
        source=lambda turn, position: (position - lane.direction) % world,
        span=span,
        combine=combine,
    )


def _chain(lane: Lane, world: int, count: int, root: int) -> Strand:
    def distance(position: Ints) -> Ints:
        return lane.direction * (position - root) % world

    def span(turn: Ints, position: Ints) -> Span:
        return lane.part(np.zeros_like(position), np.full_like(position, count))

    return Strand(
        steps=range(world - 1),
        target=lambda turn, position: np.where(distance(position) == turn, (position + lane.direction) % world, NOBODY),
        source=lambda turn, position: np.where(
            distance(position) == turn + 1, (position - lane.direction) % world, NOBODY
        ),
        span=span,
    )


def _by_position(parts: Parts, order: Order) -> Parts:
    """The part of the rank at each position."""
    if order is None:
        return parts
    ranks = np.array(order)
    return lambda position: parts(ranks[position])


def _placed(strand: Strand, world: int, order: Order) -> Strand:
    """A strand that numbers positions, made one that numbers ranks."""
    if order is None:
        return strand
    return lifted(strand, world, np.array([_checked(order, world)]))


def _checked(order: Order, world: int) -> Sequence[int]:
    """The rank at each position."""
    if order is None:
        return range(world)
    if sorted(order) != list(range(world)):
        raise UsageError(f"order must name each rank of a world of {world} once, not {list(order)}")
    return order
