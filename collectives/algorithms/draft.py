"""A schedule that is put together region by region: how the algorithms with computations are written.

Used by `sequence` and by whoever lays out a work buffer of its own. A region is a range of the work buffer that goes by
a key; whoever asks for the same key gets the same place. Steps may be filled in any order.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable

from collectives.errors import UsageError
from collectives.region import Range
from collectives.schedule import Operands, Schedule, Step

ALIGNMENT = 64
"""Regions begin at multiples of so many elements."""


class Draft:
    """A schedule under construction, on a work buffer whose elements are bytes as a rule.

    Attributes:
        held, wanted: by rank, the keys and ranges that it holds at the start and wants at the end, in order.

    """

    def __init__(self, kind: str, algorithm: str, world: int) -> None:
        self.held: list[dict[Hashable, Range]] = [{} for _ in range(world)]
        self.wanted: list[dict[Hashable, Range]] = [{} for _ in range(world)]
        self._names = kind, algorithm, world
        self._regions: dict[Hashable, Range] = {}
        self._count = 0
        self._kernels: dict[str, int] = {}
        self._moves: defaultdict[int, list[tuple[int, int, int, int, bool]]] = defaultdict(list)
        self._computes: defaultdict[int, list[tuple[tuple[int, int, int, int, bool], Operands]]] = defaultdict(list)

    def region(self, key: Hashable, size: int, room: int | None = None) -> Range:
        """Return the first `size` elements of a region, made at the first call with `room` for so many.

        Raises:
            UsageError: it has less room than that.

        """
        if not size:
            return 0, 0
        if key not in self._regions:
            room = size if room is None else room
            self._regions[key] = self._count, self._count + room
            self._count += -(-room // ALIGNMENT) * ALIGNMENT
        start, stop = self._regions[key]
        if size > stop - start:
            raise UsageError(f"region {key} has {stop - start} elements, and {size} were asked for")
        return start, start + size

    def hold(self, rank: int, key: Hashable, size: int) -> None:
        """The rank has this region at the start."""
        self.held[rank][key] = self.region(key, size)

    def want(self, rank: int, key: Hashable, size: int) -> None:
        """The rank has this region at the end."""
        self.wanted[rank][key] = self.region(key, size)

    def move(self, step: int, src: int, dst: int, span: Range, combine: bool = False) -> None:
        """Copy a range from one rank to another, or reduce it there; nothing if it is empty, or they are the same."""
        if span[0] < span[1] and src != dst:
            self._moves[step].append((src, dst, *span, combine))

    def compute(self, step: int, rank: int, kernel: str, writes: Iterable[Range], reads: Iterable[Range]) -> None:
        """Run a kernel on views of the ranges that are not empty: what it writes, then what it reads.

        Nothing is computed if it writes nothing.
        """
        written = [span for span in writes if span[0] < span[1]]
        if not written:
            return
        number = self._kernels.setdefault(kernel, len(self._kernels))
        read = tuple(span for span in reads if span[0] < span[1])
        first, *others = written
        self._computes[step].append(((rank, number, *first, False), Operands(read, tuple(others))))

    def built(self) -> Schedule:
        """Return the schedule; steps in which nothing happens are left out."""
        kind, algorithm, world = self._names
        steps = []
        for index in sorted({*self._moves, *self._computes}):
            rows = self._computes.get(index, [])
            steps.append(Step.of(self._moves.get(index, ()), [row for row, _ in rows], [also for _, also in rows]))
        held, wanted = ([tuple(mine.values()) for mine in side] for side in (self.held, self.wanted))
        return Schedule.from_steps(kind, algorithm, world, self._count, steps, held, wanted, tuple(self._kernels))
