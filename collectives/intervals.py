"""A map from ranges of integers to values; the program compiler keeps in it what is known of the work buffer."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class IntervalMap(Generic[V]):
    """Values for all of [0, stop), piecewise constant: `initial` at first."""

    def __init__(self, stop: int, initial: V) -> None:
        self._stop = stop
        self._starts = [0]
        self._values = [initial]

    def __len__(self) -> int:
        """Number of pieces; equal neighbours count apart."""
        return len(self._starts)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, V]]:
        """Yield (start, stop, value) for the pieces of [start, stop), in order."""
        at = bisect_right(self._starts, start) - 1
        while start < stop:
            end = self._starts[at + 1] if at + 1 < len(self._starts) else self._stop
            yield start, min(end, stop), self._values[at]
            start = end
            at += 1

    def assign(self, start: int, stop: int, value: V) -> None:
        """Give all of [start, stop), which must not be empty, one value."""
        first = self._cut(start)
        last = self._cut(stop)
        self._starts[first:last] = [start]
        self._values[first:last] = [value]

    def _cut(self, where: int) -> int:
        """Make a piece begin at `where` and return its index (one past the last for the end)."""
        if where == self._stop:
            return len(self._starts)
        at = bisect_left(self._starts, where)
        if at == len(self._starts) or self._starts[at] != where:
            self._starts.insert(at, where)
            self._values.insert(at, self._values[at - 1])
        return at
