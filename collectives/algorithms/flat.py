"""Flat: the root deals with every other rank itself, in one step.

The fewest steps and, for gather and scatter, the fewest bytes; for broadcast and reduce the root's link carries
`world - 1` whole buffers, which pays for few ranks or small messages only. The root folds in what it reduces in the
fixed order `root + 1`, `root + 2`, ... round the circle.

Schedules are remembered: the same arguments give the same object.
"""

from collectives.algorithms.parts import checked_root, everything, only, own, parts_of
from collectives.algorithms.strand import finishing_root, outward, remembered, schedule, whole
from collectives.region import Ints
from collectives.schedule import Schedule

_NAME = "flat"


@remembered
def broadcast(world: int, count: int, root: int = 0) -> Schedule:
    """Every rank ends with the buffer of `root`.

    Raises:
        UsageError: `root` is not a rank.

    """
    give, _ = outward(world, checked_root("broadcast", root, world), whole(count))
    return schedule("broadcast", _NAME, world, count, (give(0),), held=only(root, count), wanted=everything(count))


@remembered
def reduce(world: int, count: int, finish: bool = False, root: int = 0) -> Schedule:
    """Rank `root` ends with the reduction of all, and runs the elementwise kernel "finish" on it if asked.

    Raises:
        UsageError: `root` is not a rank.

    """
    _, take = outward(world, checked_root("reduce", root, world), whole(count))
    end = finishing_root(finish, min(1, world - 1), root, count)
    held, wanted = everything(count), only(root, count)
    return schedule("reduce", _NAME, world, count, (take(0, combine=True),), held=held, wanted=wanted, finishes=end)


@remembered
def gather(world: int, count: int, root: int = 0, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `r` begins with part `r` of `split(count, world)`, or of parts of these lengths; `root` ends with all.

    Raises:
        UsageError: `root` is not a rank.

    """
    parts = parts_of(count, world, counts)
    at = checked_root("gather", root, world)
    _, take = outward(world, at, lambda turn, rank: parts((at + 1 + turn) % world))
    return schedule("gather", _NAME, world, count, (take(0),), held=own(parts), wanted=only(root, count))


@remembered
def scatter(world: int, count: int, root: int = 0, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `root` begins with all; rank `r` ends with part `r` of `split(count, world)`, or of parts of these lengths.

    Raises:
        UsageError: `root` is not a rank.

    """
    parts = parts_of(count, world, counts)
    at = checked_root("scatter", root, world)

    def span(turn: Ints, rank: Ints) -> tuple[Ints, Ints]:
        return parts((at + 1 + turn) % world)

    give, _ = outward(world, at, span)
    return schedule("scatter", _NAME, world, count, (give(0),), held=only(root, count), wanted=own(parts))
