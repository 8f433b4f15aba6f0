"""Direct exchange: every rank deals with every other one itself, in one step.

The fewest steps that there are, and as few bytes as any algorithm; the price is `world - 1` messages out of each rank
at once. Best where a message costs little: between processes that read each other's memory, and for blocks that are
large even when cut into `world` parts. Reductions are done by the owner of a chunk, which has all contributions at
hand; it folds them in the fixed order `r + 1`, `r + 2`, ... round the circle, so that the bits are those of any other
run. Ranks also receive in that order, so that no two wait for the same sender first.

Broadcast and reduce put two exchanges behind each other, so that the root moves its buffer but once: a scatter and an
all-gather (van de Geijn; Thakur, Rabenseifner and Gropp, IJHPCA 19, 2005) among the ranks that are not the root.

Schedules are remembered: the same arguments give the same object. They suit up to some hundreds of ranks: a step of the
whole has `world * (world - 1)` rows.
"""

from collections.abc import Callable

import numpy as np

from collectives.algorithms.parts import (
    Parts,
    Span,
    blocks_of,
    checked_root,
    column_of,
    even,
    everything,
    only,
    own,
    parts_of,
    row_of,
)
from collectives.algorithms.strand import Strand, finishing, lifted, outward, remembered, schedule
from collectives.region import Ints
from collectives.schedule import Schedule

_NAME = "direct"


@remembered
def all_reduce(world: int, count: int, finish: bool = False) -> Schedule:
    """Every rank ends with the reduction of all: each reduces its chunk and sends it to all.

    Two steps, `2 (world - 1) / world * count` elements sent by each rank. With `finish`, the owner of a chunk runs the
    elementwise kernel "finish" on it, once, between the two.
    """
    parts = parts_of(count, world, None)
    strands = (reducing(world, parts), gathering(world, parts, 1 + finish))
    end = finishing(finish, min(1, world - 1), parts)
    held = wanted = everything(count)
    return schedule("all_reduce", _NAME, world, count, strands, held=held, wanted=wanted, finishes=end)


@remembered
def reduce_scatter(world: int, count: int, finish: bool = False, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `r` ends with its chunk, reduced over all ranks; the rest is undefined.

    One step, `(world - 1) / world * count` elements sent by each rank. With `finish`, each rank runs the elementwise
    kernel "finish" on its chunk at the end. The chunks are `split(count, world)`, or have the lengths `counts`.
    """
    parts = parts_of(count, world, counts)
    strands, whole = (reducing(world, parts),), everything(count)
    end = finishing(finish, min(1, world - 1), parts)
    return schedule("reduce_scatter", _NAME, world, count, strands, held=whole, wanted=own(parts), finishes=end)


@remembered
def all_gather(world: int, count: int, counts: tuple[int, ...] | None = None) -> Schedule:
    """Every rank begins with its chunk, and ends with the chunks of all.

    One step, `(world - 1) / world * count` elements sent by each rank. The chunks are `split(count, world)`, or have
    the lengths `counts`.
    """
    parts = parts_of(count, world, counts)
    strands, whole = (gathering(world, parts),), everything(count)
    return schedule("all_gather", _NAME, world, count, strands, held=own(parts), wanted=whole)


@remembered
def all_to_all(world: int, count: int, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `s` begins with row `s` of `world * world` blocks, rank `d` ends with column `d`.

    One step. The blocks are equal, or have the lengths `counts`.
    """
    blocks = blocks_of(count, world, counts)
    strands = (_exchange(world, 0, lambda turn, rank: blocks(rank * world + _target(world, turn, rank))),)
    held, wanted = row_of(blocks, world), column_of(blocks, world)
    return schedule("all_to_all", _NAME, world, count, strands, held=held, wanted=wanted)


@remembered
def broadcast(world: int, count: int, root: int = 0) -> Schedule:
    """Every rank ends with the buffer of `root`, which gives a part to each of the others, which give it to each other.

    Two steps; nobody sends more than `count` elements.

    Raises:
        UsageError: `root` is not a rank.

    """
    at = checked_root("broadcast", root, world)
    strands = spreading(world, count, at)
    return schedule("broadcast", _NAME, world, count, strands, held=only(root, count), wanted=everything(count))


@remembered
def reduce(world: int, count: int, finish: bool = False, root: int = 0) -> Schedule:
    """Rank `root` ends with the reduction of all: the others reduce a part each, over all ranks, and send it there.

    Two steps; nobody sends or receives more than `count` elements. With `finish`, the elementwise kernel "finish" runs
    where a part is reduced.

    Raises:
        UsageError: `root` is not a rank.

    """
    at = checked_root("reduce", root, world)
    parts = _parts_of_others(world, count)
    give, take = outward(world, at, lambda turn, rank: parts(turn))
    strands = (
        give(0, combine=True),
        *_among_others(world, at, reducing(world - 1, parts)),
        take(1 + finish),
    )

    def reduced(rank: Ints) -> Span:
        start, stop = parts((rank - root - 1) % world % max(1, world - 1))
        return start, np.where((rank == root) & (world > 1), start, stop)

    end = finishing(finish, min(1, world - 1), reduced)
    held, wanted = everything(count), only(root, count)
    return schedule("reduce", _NAME, world, count, strands, held=held, wanted=wanted, finishes=end)


def reducing(world: int, parts: Parts, first: int = 0) -> Strand:
    """Every rank gets the contributions of all to its part, in step `first`."""
    return _exchange(world, first, lambda turn, rank: parts(_target(world, turn, rank)), combine=True)


def gathering(world: int, parts: Parts, first: int = 0) -> Strand:
    """Every rank sends its part to all, in step `first`."""
    return _exchange(world, first, lambda turn, rank: parts(rank))


def spreading(world: int, count: int, root: int, first: int = 0) -> tuple[Strand, ...]:
    """The broadcast of the whole buffer, in step `first` and the one after it."""
    parts = _parts_of_others(world, count)
    give, _ = outward(world, root, lambda turn, rank: parts(turn))
    return give(first), *_among_others(world, root, gathering(world - 1, parts, first + 1))


def _exchange(world: int, step: int, span: Callable[[Ints, Ints], Span], *, combine: bool = False) -> Strand:
    return Strand(
        steps=range(step, step + (world > 1)),
        target=lambda turn, rank: _target(world, turn, rank),
        source=lambda turn, rank: (rank + 1 + turn) % world,
        span=span,
        combine=combine,
        turns=max(1, world - 1),
    )


def _target(world: int, turn: Ints, rank: Ints) -> Ints:
    return (rank - 1 - turn) % world


def _parts_of_others(world: int, count: int) -> Parts:
    """A part for each rank but the root, the next one first; in a world of one the root has it all."""
    return even(count, max(1, world - 1))


def _among_others(world: int, root: int, strand: Strand) -> tuple[Strand, ...]:
    """A strand of `world - 1` ranks, for those that are not the root."""
    if world == 1:
        return ()
    return (lifted(strand, world, (root + 1 + np.arange(world - 1)[None]) % world),)
