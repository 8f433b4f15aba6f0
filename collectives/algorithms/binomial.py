"""The binomial tree: rooted operations in a logarithmic number of steps, for small messages.

Ranks are numbered from the root. Inwards, in step `t` a rank whose lowest set bit is `t` hands on what it has to the
rank without that bit, which is nearer to the root; outwards it is the same backwards. So a rank stands for a row of
`2**t` ranks from itself on, and gather and scatter move the parts of all of these at once (Thakur, Rabenseifner and
Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19, 2005).

Schedules are remembered: the same arguments give the same object.
"""

from collections.abc import Callable

import numpy as np

from collectives.algorithms.parts import Parts, Span, arc, checked_root, everything, only, own, parts_of
from collectives.algorithms.strand import NOBODY, Strand, finishing_root, remembered, schedule, whole
from collectives.region import Ints
from collectives.schedule import Schedule

_NAME = "binomial"
_SIDES = 2
"""Turns a step: a row of ranks may go round the end of the world, and its parts come in two ranges then."""


@remembered
def broadcast(world: int, count: int, root: int = 0) -> Schedule:
    """Every rank ends with the buffer of `root`. `ceil(log2(world))` steps of `count` elements.

    Raises:
        UsageError: `root` is not a rank.

    """
    strand = _outwards(world, checked_root("broadcast", root, world), whole(count), turns=1)
    return schedule("broadcast", _NAME, world, count, (strand,), held=only(root, count), wanted=everything(count))


@remembered
def reduce(world: int, count: int, finish: bool = False, root: int = 0) -> Schedule:
    """Rank `root` ends with the reduction of all, and runs the elementwise kernel "finish" on it if asked.

    `ceil(log2(world))` steps of `count` elements.

    Raises:
        UsageError: `root` is not a rank.

    """
    strand = _inwards(world, checked_root("reduce", root, world), whole(count), turns=1, combine=True)
    end = finishing_root(finish, _depth(world), root, count)
    held, wanted = everything(count), only(root, count)
    return schedule("reduce", _NAME, world, count, (strand,), held=held, wanted=wanted, finishes=end)


@remembered
def gather(world: int, count: int, root: int = 0, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `r` begins with part `r` of `split(count, world)`, or of parts of these lengths; `root` ends with all.

    `ceil(log2(world))` steps; a part is moved up to that many times.

    Raises:
        UsageError: `root` is not a rank.

    """
    parts = parts_of(count, world, counts)
    at = checked_root("gather", root, world)

    def span(turn: Ints, rank: Ints) -> Span:
        return _row(world, parts, rank, (rank - at) % world, turn // _SIDES, turn)

    strand = _inwards(world, at, span, turns=_SIDES)
    return schedule("gather", _NAME, world, count, (strand,), held=own(parts), wanted=only(root, count))


@remembered
def scatter(world: int, count: int, root: int = 0, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `root` begins with all; rank `r` ends with part `r` of `split(count, world)`, or of parts of these lengths.

    `ceil(log2(world))` steps; a part is moved up to that many times.

    Raises:
        UsageError: `root` is not a rank.

    """
    parts = parts_of(count, world, counts)
    at = checked_root("scatter", root, world)

    def span(turn: Ints, rank: Ints) -> Span:
        bit = _depth(world) - 1 - turn // _SIDES
        near = (rank - at) % world + np.left_shift(1, bit)
        return _row(world, parts, (at + near) % world, near, bit, turn)

    strand = _outwards(world, at, span, turns=_SIDES)
    return schedule("scatter", _NAME, world, count, (strand,), held=only(root, count), wanted=own(parts))


def _depth(world: int) -> int:
    return (world - 1).bit_length()


def _row(world: int, parts: Parts, rank: Ints, number: Ints, bit: Ints, turn: Ints) -> Span:
    """The parts of the ranks that a rank stands for; counted from the root it has that number."""
    length = np.maximum(np.minimum(np.left_shift(1, bit), world - number), 0)
    return arc(parts, world, rank, length, turn)


def _inwards(world: int, root: int, span: Callable[[Ints, Ints], Span], *, turns: int, combine: bool = False) -> Strand:
    def target(turn: Ints, rank: Ints) -> Ints:
        return _giver(world, root, turn // turns, rank)

    def source(turn: Ints, rank: Ints) -> Ints:
        return _taker(world, root, turn // turns, rank)

    return Strand(range(_depth(world)), target, source, span, combine=combine, turns=turns)


def _outwards(world: int, root: int, span: Callable[[Ints, Ints], Span], *, turns: int) -> Strand:
    last = _depth(world) - 1

    def target(turn: Ints, rank: Ints) -> Ints:
        return _taker(world, root, last - turn // turns, rank)

    def source(turn: Ints, rank: Ints) -> Ints:
        return _giver(world, root, last - turn // turns, rank)

    return Strand(range(last + 1), target, source, span, turns=turns)


def _giver(world: int, root: int, bit: Ints, rank: Ints) -> Ints:
    """Inwards: to whom a rank hands on in the step of that bit."""
    number, size = (rank - root) % world, np.left_shift(1, bit)
    return np.where(number % (2 * size) == size, (rank - size) % world, NOBODY)


def _taker(world: int, root: int, bit: Ints, rank: Ints) -> Ints:
    """Inwards: from whom a rank takes over in the step of that bit."""
    number, size = (rank - root) % world, np.left_shift(1, bit)
    return np.where((number % (2 * size) == 0) & (number + size < world), (rank + size) % world, NOBODY)
