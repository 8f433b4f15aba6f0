"""Recursive halving and doubling: as few bytes as the ring, in a logarithmic number of steps, for any number of ranks.

Halving: in each step a rank passes half of what it is still reducing on to another rank and takes up the other half
from a third, until it is left with its own chunk. Doubling is the same backwards and without reducing. One behind the
other are an all-reduce (Rabenseifner, "Optimization of collective reduction operations", ICCS 2004). The partners here
are not those that differ in a bit but those at distances `ceil(world / 2)`, `ceil(world / 4)`, ..., 1 round a circle,
which needs no detour where the world is no power of two (Träff, "Optimal, non-pipelined reduce-scatter and allreduce
algorithms", arXiv:2410.14234; the doubling is that of Bruck et al., IEEE TPDS 8, 1997).

A rank numbers the chunks from its own: chunk `j` of rank `r` is that of rank `r + j`. With `outer` of them in hand and
`inner = ceil(outer / 2)`, it sends chunks `inner` to `outer - 1` to rank `r + inner`, whose chunks 0 to
`outer - inner - 1` they are. Each chunk is reduced along one tree, so the order of reduction is fixed and all get the
same bits.

Schedules are remembered: the same arguments give the same object.
"""

from itertools import pairwise

from collectives.algorithms.parts import Parts, Span, arc, everything, own, parts_of
from collectives.algorithms.strand import Strand, finishing, remembered, schedule
from collectives.region import Ints
from collectives.schedule import Schedule

_NAME = "halving_doubling"


@remembered
def all_reduce(world: int, count: int, finish: bool = False) -> Schedule:
    """Every rank ends with the reduction of all.

    `2 ceil(log2(world))` steps, `2 (world - 1) / world * count` elements sent by each rank. With `finish`, the owner of
    a chunk runs the elementwise kernel "finish" on it, once, between the two halves.
    """
    parts = parts_of(count, world, None)
    turn = rounds(world)
    strands = halving(world, parts) + doubling(world, parts, turn + finish)
    end = finishing(finish, turn, parts)
    held = wanted = everything(count)
    return schedule("all_reduce", _NAME, world, count, strands, held=held, wanted=wanted, finishes=end)


@remembered
def reduce_scatter(world: int, count: int, finish: bool = False, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `r` ends with its chunk, reduced over all ranks; the rest is undefined.

    `ceil(log2(world))` steps, `(world - 1) / world * count` elements sent by each rank. With `finish`, each rank runs
    the elementwise kernel "finish" on its chunk at the end. The chunks are `split(count, world)`, or have the lengths
    `counts`.
    """
    parts = parts_of(count, world, counts)
    end = finishing(finish, rounds(world), parts)
    strands, whole = halving(world, parts), everything(count)
    return schedule("reduce_scatter", _NAME, world, count, strands, held=whole, wanted=own(parts), finishes=end)


@remembered
def all_gather(world: int, count: int, counts: tuple[int, ...] | None = None) -> Schedule:
    """Every rank begins with its chunk, and ends with the chunks of all.

    `ceil(log2(world))` steps, `(world - 1) / world * count` elements sent by each rank. The chunks are
    `split(count, world)`, or have the lengths `counts`.
    """
    parts = parts_of(count, world, counts)
    strands, whole = doubling(world, parts), everything(count)
    return schedule("all_gather", _NAME, world, count, strands, held=own(parts), wanted=whole)


def rounds(world: int) -> int:
    """Steps of `halving`, and of `doubling`."""
    return (world - 1).bit_length()


def halving(world: int, parts: Parts, first: int = 0) -> tuple[Strand, ...]:
    """The reduce-scatter of these parts, one a rank, from step `first` on."""
    return tuple(
        _shift(world, parts, first + turn, +inner, inner, outer - inner, combine=True)
        for turn, (outer, inner) in enumerate(pairwise(_halves(world)))
    )


def doubling(world: int, parts: Parts, first: int = 0) -> tuple[Strand, ...]:
    """The all-gather of these parts, one a rank, from step `first` on."""
    return tuple(
        _shift(world, parts, first + turn, -inner, 0, outer - inner, combine=False)
        for turn, (inner, outer) in enumerate(pairwise(reversed(_halves(world))))
    )


def _halves(world: int) -> list[int]:
    """How many chunks a rank has in hand before each step of the halving, and at the end: one."""
    halves = [world]
    while halves[-1] > 1:
        halves.append((halves[-1] + 1) // 2)
    return halves


def _shift(world: int, parts: Parts, step: int, distance: int, low: int, length: int, *, combine: bool) -> Strand:
    """Each rank sends the `length` chunks from its `low`-th on to the rank at that distance."""

    def span(turn: Ints, rank: Ints) -> Span:
        return arc(parts, world, (rank + low) % world, length + 0 * rank, turn)

    return Strand(
        steps=range(step, step + 1),
        target=lambda turn, rank: (rank + distance) % world,
        source=lambda turn, rank: (rank - distance) % world,
        span=span,
        combine=combine,
        turns=2,
    )
