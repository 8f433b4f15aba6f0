"""An all-reduce taken apart: reduce-scatter, a computation on each rank's rows, all-gather; one schedule.

TokenWeave (Gond, Kwatra and Ramjee, 2025, arXiv:2505.11329) puts the residual addition and the norm between the two, on
1/N of the rows. Used by `parallel.overlap`.
"""

from functools import lru_cache

from collectives.algorithms.draft import Draft
from collectives.region import split
from collectives.schedule import Schedule

KERNEL = "between"
"""Called with (gathered rows, kept rows, summed rows, rows that were kept before); it sets the first two."""


@lru_cache(maxsize=256)
def weave(world: int, rows: int, width: int) -> Schedule:
    """Each rank holds all rows to be summed and its own part of others, and wants all rows and its own part.

    Rows are `width` elements; rank r's part is `region.split(rows, world)[r]`. Each part is summed at its owner, from
    his own on backwards through the ranks, so that all have the same bits.
    """
    draft = Draft("weave", "direct", world)
    parts = [(stop - start) * width for start, stop in split(rows, world)]
    for rank in range(world):
        for part, size in enumerate(parts):
            draft.hold(rank, ("sum", part), size)
        draft.hold(rank, ("before", rank), parts[rank])
    for ahead in range(1, world):  # each sends to another one at any time, so that nobody's link is in demand by all
        for rank in range(world):
            other = (rank + ahead) % world
            draft.move(0, rank, other, draft.region(("sum", other), parts[other]), combine=True)
            draft.move(2, rank, other, draft.region(("all", rank), parts[rank]))
    for rank, size in enumerate(parts):
        summed, gathered = draft.region(("sum", rank), size), draft.region(("all", rank), size)
        before, kept = draft.region(("before", rank), size), draft.region(("kept", rank), size)
        draft.compute(1, rank, KERNEL, [gathered, kept], [summed, before])
    for rank in range(world):
        for part, size in enumerate(parts):
            draft.want(rank, ("all", part), size)
    for rank, size in enumerate(parts):
        draft.want(rank, ("kept", rank), size)
    return draft.built()
