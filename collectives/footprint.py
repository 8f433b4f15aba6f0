"""What a rank keeps in staging: the ranges of the work buffer that it ever writes, side by side, in their order.

The program compiler (`program`) finds the ranges with `plan` and moves its instructions to where they are.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from collectives.instructions import STAGING, Where
from collectives.region import Range


class Footprint:
    """Places of ranges of the work buffer in staging, which has `size` elements.

    Args:
        ranges: what is kept: in order, none empty, none overlapping.

    """

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._starts: list[int] = []
        self._shifts: list[int] = []
        self.size = 0
        for start, stop in ranges:
            self._starts.append(start)
            self._shifts.append(start - self.size)
            self.size += stop - start

    def place(self, where: Where) -> Where:
        """Where a range of the work buffer lies, if it is one of staging; all of it must be kept."""
        memory, start, stop = where
        if memory != STAGING or start == stop:
            return where
        shift = self._shifts[bisect_right(self._starts, start) - 1]
        return Where(memory, start - shift, stop - shift)


def merged(pieces: Iterable[Where]) -> Iterator[Where]:
    """The same pieces in order, those that follow each other in one memory as one."""
    last: Where | None = None
    for piece in pieces:
        if last is not None and (last.memory, last.stop) == (piece.memory, piece.start):
            last = Where(last.memory, last.start, piece.stop)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
