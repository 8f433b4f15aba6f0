"""When each range of each rank's buffer is ready to be sent on; what `simulate` knows of memory.

The buffer is cut into cells at every place where some transfer of the schedule begins or ends. For each rank and cell
two times are kept: when its first segment and when its last one is there.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from collectives.errors import UsageError
from collectives.queues import Numbers
from collectives.region import Ints
from collectives.schedule import Schedule
from collectives.topology import Floats

MOST = 2**26
"""Ranks times cells that are kept track of: half a GiB, or one where transfers have several segments."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first pass over a schedule finds."""

    bounds: Ints
    """Where cells begin, in order, and the end of the last one."""
    longest: int
    """Elements of the longest transfer."""


def survey(schedule: Schedule) -> Survey:
    """Look at all steps of a schedule. If nothing that is received is ever sent on, one cell is enough.

    Raises:
        UsageError: there are more ranks times cells than can be kept track of.

    """
    bounds = np.array([0, max(1, schedule.count)])
    own = [_envelope(schedule, rank) for rank in range(schedule.world)]
    low, high = (np.array(edge, dtype=np.int64) for edge in zip(*own, strict=True))
    longest, relays = 0, False
    for index in range(len(schedule)):
        step = schedule.step(index)
        longest = max(longest, int((step.stop - step.start).max(initial=0)))
        if not relays:
            outside = (step.start < low[step.src]) | (step.stop > high[step.src])
            inside = (step.stop > low[step.dst]) & (step.start < high[step.dst])
            relays = bool(outside.any() or inside.any() or len(step.computes.rank))
        for edges in (step.start, step.stop, step.computes.start, step.computes.stop):
            fits = len(edges) and len(bounds) * schedule.world <= MOST
            if fits and not np.array_equal(bounds[np.searchsorted(bounds, edges)], edges):
                bounds = np.union1d(bounds, edges)
    if relays and len(bounds) * schedule.world > MOST:
        raise UsageError(
            f"{schedule.kind} by {schedule.algorithm!r} over {schedule.world} ranks passes on more ranges than can be "
            f"kept track of; simulate fewer ranks"
        )
    return Survey(bounds if relays else bounds[[0, -1]], longest)


def _envelope(schedule: Schedule, rank: int) -> tuple[int, int]:
    """The range that a rank holds; an empty one where it holds several, or none."""
    held = schedule.held(rank)
    joined = all(before[1] == after[0] for before, after in pairwise(held))
    return (held[0][0], held[-1][1]) if held and joined else (0, 0)


@dataclass(frozen=True, slots=True)
class Place:
    """Ranges of a step's transfers, none of them empty, and where their cells are."""

    start: Ints
    stop: Ints
    low: Ints
    """The first cell of each range."""
    cells: Ints | None
    """How many cells each range has; None if all have one."""


class Readiness:
    """The two times of each rank and cell; 0 for what is there from the start.

    Args:
        world: number of ranks.
        bounds: of the cells.
        segment: length of a segment, elements.
        single: no transfer has more than one segment, so that the two times are the same.

    """

    def __init__(self, world: int, bounds: Ints, segment: int, single: bool) -> None:
        self._bounds = bounds
        self._segment = segment
        self._count = len(bounds) - 1
        self._last = np.zeros(world * self._count)
        self._first = self._last if single else np.zeros(world * self._count)

    def place(self, start: Ints, stop: Ints) -> Place:
        """Find the cells of ranges, none of them empty."""
        if self._count == 1:
            return Place(start, stop, np.zeros_like(start), None)
        low: Ints = np.searchsorted(self._bounds, start)
        if np.array_equal(self._bounds[low + 1], stop):
            return Place(start, stop, low, None)
        return Place(start, stop, low, np.searchsorted(self._bounds, stop) - low)

    def of(self, rank: Numbers, place: Place) -> tuple[Floats, Floats]:
        """When the first and the last segment of each of these ranges is there."""
        at = rank * np.int64(self._count) + place.low
        if place.cells is None:
            return self._first[at], self._last[at]
        begins = np.cumsum(place.cells) - place.cells
        every = _expanded(at, place.cells, begins)
        last = np.maximum.reduceat(self._last[every], begins)
        bound = self._bounds[every % self._count]
        early = bound < np.repeat(place.start + self._segment_of(place), place.cells)
        first = np.maximum.reduceat(np.where(early, self._first[every], 0.0), begins)
        return first, last

    def put(self, rank: Numbers, place: Place, first: Floats, last: Floats, apart: bool) -> None:
        """Note when the segments of ranges are there, which is not before what was there before.

        `apart`: no rank is there twice.
        """
        at = rank * np.int64(self._count) + place.low
        if place.cells is None:
            self._note(self._last, at, last, apart)
            if self._first is not self._last:
                self._note(self._first, at, first, apart)
            return
        begins = np.cumsum(place.cells) - place.cells
        every = _expanded(at, place.cells, begins)
        cell = every % self._count
        origin = np.repeat(place.start, place.cells)
        piece = np.repeat(self._segment_of(place), place.cells)
        pieces = np.repeat(segments(place.stop - place.start, self._segment), place.cells)
        begin = np.repeat(first, place.cells)
        pace = (np.repeat(last, place.cells) - begin) / np.maximum(pieces - 1, 1)
        number = np.where(pieces == 1, 1, (self._bounds[cell + 1] - 1 - origin) // piece)
        self._note(self._last, every, begin + pace * number, apart)
        if self._first is not self._last:
            number = np.where(pieces == 1, 1, (self._bounds[cell] - origin) // piece)
            self._note(self._first, every, begin + pace * number, apart)

    @staticmethod
    def _note(times: Floats, at: Ints, values: Floats, apart: bool) -> None:
        if apart:
            times[at] = values
        else:
            np.maximum.at(times, at, values)

    def _segment_of(self, place: Place) -> Floats:
        """How long the segments of each range are, in elements."""
        length = place.stop - place.start
        return length / segments(length, self._segment)


def segments(length: Ints, segment: int) -> Floats:
    """Into how many segments transfers of these lengths are cut, both in the same unit."""
    return np.maximum(1.0, np.rint(length / segment))


def _expanded(at: Ints, cells: Ints, begins: Ints) -> Ints:
    """The numbers at[i], at[i] + 1, ... of each row, as many as it has cells, one row behind the other."""
    return np.repeat(at - begins, cells) + np.arange(int(cells.sum()))
