"""Who uses which part of a range of numbers, such as addresses or places in a file. `arena` uses it."""

from bisect import bisect_left, insort


class Space:
    """Gives away parts of [0, size), the first that are large enough, and takes them back."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]
        """(start, stop) of what nobody uses, in order, no two of them adjacent."""

    def take(self, size: int) -> int | None:
        """Return the start of so much; None if no free part is that large."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def give_back(self, start: int, stop: int) -> None:
        """Take back a part of what was given away."""
        index = bisect_left(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
        insort(self._free, (start, stop))
