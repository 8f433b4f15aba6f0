"""Chunks that travel round a ring of ranks: what the ring and the bidirectional ring share.

The buffer is cut into `split(count, world)` and rank `r` owns chunk `r`. Going round in direction `d` (+1 or -1),
rank `r` reduces what it gets and passes it on to rank `r + d`, in turn `t` the chunk `r - d - d * t`; after `world - 1`
turns the last one that it got is its own, fully reduced: a reduce-scatter. Passing chunks on in the same way, but
overwriting instead of reducing, is an all-gather. Each chunk is reduced along one path, so the order of reduction is
fixed, and every rank gets a copy of the same bits.

A lane is a direction and the part of each chunk that takes it. The ring has one lane, for whole chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from collectives.algorithms.strand import NOBODY, Finish, Span, Strand, chunks, everything, schedule
from collectives.errors import UsageError
from collectives.region import Ints, Ranges, chunk
from collectives.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Lane:
    """A direction round the ring and the part of a range (start, stop) that takes it."""

    direction: int
    part: Callable[[Ints, Ints], Span]


def all_reduce(algorithm: str, world: int, count: int, finish: bool, lanes: tuple[Lane, ...]) -> Schedule:
    """Reduce-scatter, then finish if asked, then all-gather."""
    first = world - 1 + finish
    strands = tuple(_reducing(lane, world, count) for lane in lanes)
    strands += tuple(_gathering(lane, world, count, first) for lane in lanes)
    whole = everything(count)
    end = _finishing(finish, world, count)
    return schedule("all_reduce", algorithm, world, count, strands, held=whole, wanted=whole, finish=end)


def reduce_scatter(algorithm: str, world: int, count: int, finish: bool, lanes: tuple[Lane, ...]) -> Schedule:
    """Rank `r` ends with chunk `r` reduced, and finished if asked."""
    strands = tuple(_reducing(lane, world, count) for lane in lanes)
    end = _finishing(finish, world, count)
    whole, own = everything(count), chunks(count, world)
    return schedule("reduce_scatter", algorithm, world, count, strands, held=whole, wanted=own, finish=end)


def all_gather(algorithm: str, world: int, count: int, lanes: tuple[Lane, ...]) -> Schedule:
    """Rank `r` begins with chunk `r`; all end with all."""
    strands = tuple(_gathering(lane, world, count, 0) for lane in lanes)
    whole, own = everything(count), chunks(count, world)
    return schedule("all_gather", algorithm, world, count, strands, held=own, wanted=whole)


def broadcast(algorithm: str, world: int, count: int, root: int, lanes: tuple[Lane, ...]) -> Schedule:
    """A chain from the root: in turn `t` the rank at distance `t` passes the buffer on.

    Raises:
        UsageError: `root` is not a rank.

    """
    if not 0 <= root < world:
        raise UsageError(f"broadcast from root {root}: not a rank of a world of {world}")
    strands = tuple(_chain(lane, world, count, root) for lane in lanes)
    whole = everything(count)

    def held(rank: int) -> Ranges:
        return whole(rank) if rank == root else ()

    return schedule("broadcast", algorithm, world, count, strands, held=held, wanted=whole)


def _reducing(lane: Lane, world: int, count: int) -> Strand:
    def span(turn: Ints, rank: Ints) -> Span:
        return lane.part(*chunk(count, world, (rank - lane.direction * (turn + 1)) % world))

    return _round(lane, world, 0, span, combine=True)


def _gathering(lane: Lane, world: int, count: int, first: int) -> Strand:
    def span(turn: Ints, rank: Ints) -> Span:
        return lane.part(*chunk(count, world, (rank - lane.direction * turn) % world))

    return _round(lane, world, first, span, combine=False)


def _round(lane: Lane, world: int, first: int, span: Callable[[Ints, Ints], Span], combine: bool) -> Strand:
    return Strand(
        steps=range(first, first + world - 1),
        target=lambda turn, rank: (rank + lane.direction) % world,
        source=lambda turn, rank: (rank - lane.direction) % world,
        span=span,
        combine=combine,
    )


def _chain(lane: Lane, world: int, count: int, root: int) -> Strand:
    def distance(rank: Ints) -> Ints:
        return lane.direction * (rank - root) % world

    def span(turn: Ints, rank: Ints) -> Span:
        return lane.part(np.zeros_like(rank), np.full_like(rank, count))

    return Strand(
        steps=range(world - 1),
        target=lambda turn, rank: np.where(distance(rank) == turn, (rank + lane.direction) % world, NOBODY),
        source=lambda turn, rank: np.where(distance(rank) == turn + 1, (rank - lane.direction) % world, NOBODY),
        span=span,
    )


def _finishing(finish: bool, world: int, count: int) -> Finish | None:
    return Finish(world - 1, lambda rank: chunk(count, world, rank)) if finish else None
