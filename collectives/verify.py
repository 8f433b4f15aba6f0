"""The proof of a schedule: a symbolic run that follows every contribution from the ranks that hold it to the ends.

Tests prove each algorithm with it, and whoever builds a schedule of explicit columns can do the same. The buffer is cut
at every boundary that occurs, into cells. For each rank and cell the run knows whose contributions are in it, as a set
of bits, whether "finish" has run, and a hash of the expression that made it. It keeps the schedule's steps and
`world**2 * cells / 8` bytes in memory, and takes milliseconds for tens of ranks, seconds for hundreds.

What is proven holds for every engine that keeps the rules of `collectives.schedule`, whatever its timing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from collectives.errors import ScheduleError
from collectives.region import Ints, Ranges
from collectives.schedule import Bools, Computes, Schedule, Step

Bits = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]

REDUCING = frozenset({"all_reduce", "reduce_scatter", "reduce", "reshard"})
"""Kinds that end with the contributions of all holders of an element; other kinds end with that of one."""

_TERMS = {
    "all_reduce": ("some", "all"),
    "reduce_scatter": ("some", "shared out"),
    "reduce": ("some", "one"),
    "all_gather": ("shared out", "all"),
    "gather": ("shared out", "one"),
    "broadcast": ("one", "all"),
    "scatter": ("one", "shared out"),
    "all_to_all": ("shared out", "shared out"),
}
"""Who must hold the buffer at the start and want it at the end: all ranks all of it, one rank all of it and the others
nothing, or each element one rank. What is reduced may be held by some ranks only. Other kinds are free."""


def verify(schedule: Schedule) -> None:
    """Prove that a schedule does what its kind promises, and that timing cannot change the result.

    The right ranks hold and want the buffer: for a gather, each element is held by one rank, and one rank wants all. In
    each step no copied range meets another write or a send of the same rank, and no computation meets anything.
    Nothing undefined is sent, reduced or computed on; no contribution is reduced in twice; nothing is finished twice,
    or before it is fully reduced. At the end each wanted range holds, exactly once, the contributions of all ranks
    that hold it (kinds in `REDUCING`) or of one of them (other kinds), finished if the schedule has a kernel "finish".
    Ranks that want the same reduced range got it from the same reductions of the same operands, up to the order of the
    two operands, so that their bits are equal. After a barrier, every rank has heard of every other.

    Raises:
        ScheduleError: it does not; the message names the step, rank and range, and what is wrong.

    """
    if schedule.kind == "barrier":
        _verify_barrier(schedule)
        return
    cut = _Cut(schedule)
    _refuse_terms(cut)
    _refuse_hazards(cut)
    state = _State(cut)
    derived = np.array([step for step, works in enumerate(cut.derived) if works], dtype=np.int64)
    for step in np.unique(np.concatenate([cut.transfers.step, cut.computes.step, derived])).tolist():
        found = [state.derive(step, work) for work in cut.derived[step]]
        state.transfer(cut.transfers.at(step))
        state.compute(cut.computes.at(step))
        for work, (parts, value) in zip(cut.derived[step], found, strict=True):
            state.parts[work.rank, work.writes], state.value[work.rank, work.writes] = parts, value
    state.conclude()


def _verify_barrier(schedule: Schedule) -> None:
    heard = np.eye(schedule.world, dtype=np.bool_)
    for index in range(len(schedule)):
        step = schedule.step(index)
        if len(step.computes.rank) or (step.start < step.stop).any():
            raise ScheduleError(f"{_name(schedule)}: step {index} moves or computes data; a barrier only notifies")
        pairs = step.src.astype(np.int64) * schedule.world + step.dst
        if len(np.unique(pairs)) < len(pairs):
            raise ScheduleError(f"{_name(schedule)}: step {index} repeats a notification")
        np.logical_or.at(heard, step.dst, heard[step.src])
    if not heard.all():
        rank, other = np.argwhere(~heard)[0].tolist()
        raise ScheduleError(f"{_name(schedule)}: rank {rank} leaves without having heard of rank {other}")


def _name(schedule: Schedule) -> str:
    return f"{schedule.algorithm} {schedule.kind} of {schedule.count} elements over {schedule.world} ranks"


@dataclass(frozen=True, slots=True)
class _Rows:
    """Transfers, or computations, in the order of steps: one row a cell."""

    step: Ints
    rank: Ints
    """The rank that is written: the destination, or the one that computes."""
    other: Ints
    """The source, or the kernel."""
    cell: Ints
    combine: Bools

    def where(self, rows: slice | Ints) -> "_Rows":
        """Some of the rows."""
        return _Rows(self.step[rows], self.rank[rows], self.other[rows], self.cell[rows], self.combine[rows])

    def at(self, step: int) -> "_Rows":
        """The rows of one step."""
        return self.where(slice(*np.searchsorted(self.step, (step, step + 1))))


class _Derived(NamedTuple):
    """A computation that sets cells from others."""

    rank: int
    kernel: int
    reads: Ints
    writes: Ints


def _in_place(work: Computes) -> Bools:
    """Which rows work in place."""
    if not work.operands:
        return np.ones(len(work.rank), np.bool_)
    return np.array([not operands.reads for operands in work.operands], np.bool_)


class _Cut:
    """A schedule with its rows cut into cells; cell `c` is `[bounds[c], bounds[c + 1])`."""

    def __init__(self, schedule: Schedule) -> None:
        steps = [schedule.step(index) for index in range(len(schedule))] or [Step.of()]
        edges = [np.array([0, schedule.count])]
        for step in steps:
            edges += [step.start, step.stop, step.computes.start, step.computes.stop]
            edges += [np.array(reads + writes, dtype=np.int64).ravel() for reads, writes in step.computes.operands]
        for rank in range(schedule.world):
            edges.append(np.array(schedule.held(rank) + schedule.wanted(rank), dtype=np.int64).ravel())
        self.schedule = schedule
        self.bounds = np.unique(np.concatenate(edges))
        self.cells = len(self.bounds) - 1
        self.held = self._mask(schedule.held)
        self.wanted = self._mask(schedule.wanted)
        self.derived = [self._derived(step.computes) for step in steps]
        """By step, the computations that set ranges from others; `computes` are those in place."""
        self.transfers = self._rows([(step.dst, step.src, step.start, step.stop, step.combine) for step in steps])
        self.computes = self._rows(
            [
                tuple(values[at] for values in (work.rank, work.kernel, work.start, work.stop, work.elementwise))
                for work, at in ((step.computes, _in_place(step.computes)) for step in steps)
            ]
        )

    def fail(self, rank: int, cell: int, what: str) -> NoReturn:
        """Refuse the schedule because of what happens to a cell of a rank."""
        low, high = self.bounds[cell : cell + 2].tolist()
        raise ScheduleError(f"{_name(self.schedule)}: rank {rank}, range [{low}, {high}): {what}")

    def _cells(self, ranges: Ranges) -> Ints:
        """The numbers of the cells of ranges."""
        spans = [np.arange(*np.searchsorted(self.bounds, span)) for span in ranges]
        return np.concatenate([*spans, np.zeros(0, np.int64)]).astype(np.int64)

    def _derived(self, work: Computes) -> list["_Derived"]:
        found = []
        for row, (reads, writes) in enumerate(work.operands):
            if reads:
                span = int(work.start[row]), int(work.stop[row])
                kernel = int(work.kernel[row])
                cells = self._cells(reads), self._cells((span, *writes))
                found.append(_Derived(int(work.rank[row]), kernel, *cells))
        return found

    def _mask(self, ranges: Callable[[int], Ranges]) -> Bools:
        mask = np.zeros((self.schedule.world, self.cells), dtype=np.bool_)
        for rank in range(self.schedule.world):
            for start, stop in ranges(rank):
                mask[rank, slice(*np.searchsorted(self.bounds, (start, stop)))] = True
        return mask

    def _rows(self, steps: list[tuple[npt.NDArray[Any], ...]]) -> _Rows:
        number = np.repeat(np.arange(len(steps)), [len(step[0]) for step in steps])
        rank, other, start, stop, flag = (np.concatenate(columns) for columns in zip(*steps, strict=True))
        low = np.searchsorted(self.bounds, start)
        length = np.searchsorted(self.bounds, stop) - low
        row = np.repeat(np.arange(len(low)), length)
        cell = np.arange(len(row)) - (np.cumsum(length) - length - low)[row]
        return _Rows(number[row], rank[row].astype(np.int64), other[row].astype(np.int64), cell, flag[row])


def _refuse_terms(cut: _Cut) -> None:
    """Refuse a schedule of a known kind that is not between the ranks that this kind is about."""
    terms = _TERMS.get(cut.schedule.kind)
    if terms is None or not cut.cells:
        return
    for verb, mask, term in zip(("held", "wanted"), (cut.held, cut.wanted), terms, strict=True):
        whole = mask.all(axis=1)
        met, wording = {
            "some": (True, ""),
            "all": (whole.all(), "whole by every rank"),
            "one": (whole.sum() == 1 and mask.any(axis=1).sum() == 1, "whole by one rank and not at all by others"),
            "shared out": ((mask.sum(axis=0) == 1).all(), "by exactly one rank in each element"),
        }[term]
        if not met:
            raise ScheduleError(f"{_name(cut.schedule)}: the buffer must be {verb} {wording}")


def _refuse_hazards(cut: _Cut) -> None:
    """Refuse what depends on timing within a step, under the rules 2 and 3 of `collectives.schedule`."""
    moves, works = cut.transfers, cut.computes

    def key(step: Ints, rank: Ints, cell: Ints) -> Ints:
        return (step * cut.schedule.world + rank) * cut.cells + cell

    def refuse(hazards: Ints, what: str) -> None:
        if len(hazards):
            place, cell = divmod(int(hazards[0]), cut.cells)
            step, rank = divmod(place, cut.schedule.world)
            cut.fail(rank, cell, f"step {step} {what}")

    written = key(moves.step, moves.rank, moves.cell)
    sent = key(moves.step, moves.other, moves.cell)
    copied, combined = written[~moves.combine], written[moves.combine]
    computed, consulted = key(works.step, works.rank, works.cell), [np.zeros(0, np.int64)]
    for step, derived in enumerate(cut.derived):
        at = [(np.int64(step) * cut.schedule.world + work.rank) * cut.cells for work in derived]
        computed = np.concatenate([computed, *(base + work.writes for base, work in zip(at, derived, strict=True))])
        consulted += [base + np.setdiff1d(work.reads, work.writes) for base, work in zip(at, derived, strict=True)]
    refuse(_repeated(copied), "overwrites it with two copies")
    refuse(np.intersect1d(copied, combined), "overwrites it and reduces into it")
    refuse(np.intersect1d(copied, sent), "overwrites it and sends it, which may wait in a circle")
    refuse(_repeated(computed), "computes on it twice")
    refuse(np.intersect1d(computed, written), "computes on it and writes it")
    refuse(np.intersect1d(computed, sent), "computes on it and sends it")
    refuse(np.intersect1d(np.concatenate(consulted), written), "reads it for a computation and overwrites it")
    refuse(np.intersect1d(np.concatenate(consulted), computed), "reads it for a computation and computes on it")


def _repeated(keys: Ints) -> Ints:
    values, counts = np.unique(keys, return_counts=True)
    return values[counts > 1]


class _State:
    """What every rank has in every cell, as the steps go by."""

    def __init__(self, cut: _Cut) -> None:
        world = cut.schedule.world
        own = np.packbits(np.eye(world, dtype=np.bool_), axis=1)
        self.cut = cut
        self.holders: Bits = np.packbits(cut.held.T, axis=1)
        """Shape (cells, bytes): the ranks that hold a cell at the start."""
        self.parts: Bits = np.where(cut.held[:, :, None], own[:, None, :], np.uint8(0))
        """Shape (world, cells, bytes): the ranks whose contributions are in it; none: undefined."""
        self.value: Hashes = np.repeat(_mix(np.arange(world, dtype=np.uint64))[:, None], cut.cells, axis=1)
        """The expression, up to the order of operands."""
        self.finished: Bools = np.zeros((world, cut.cells), dtype=np.bool_)

    def transfer(self, rows: _Rows) -> None:
        """Run the transfers of a step: all read before any writes."""
        source = rows.other, rows.cell
        parts, value, finished = self.parts[source], self.value[source], self.finished[source]
        self._require(_some(parts), rows, "step {step} writes it from rank {other}, where it is undefined")
        copied = ~rows.combine
        target = rows.rank[copied], rows.cell[copied]
        self.parts[target], self.value[target], self.finished[target] = parts[copied], value[copied], finished[copied]
        left = np.flatnonzero(rows.combine)
        while len(left):  # once, unless a rank reduces several transfers into one cell: those go in order
            _, first = np.unique(rows.rank[left] * self.cut.cells + rows.cell[left], return_index=True)
            now = left[first]
            self._reduce(rows.where(now), parts[now], value[now])
            left = np.delete(left, first)

    def _reduce(self, rows: _Rows, parts: Bits, value: Hashes) -> None:
        target = rows.rank, rows.cell
        mine = self.parts[target]
        self._require(_some(mine), rows, "step {step} reduces from rank {other} into what is undefined")
        self._require(~_some(mine & parts), rows, "step {step} reduces from rank {other} what is in it already")
        self.parts[target] = mine | parts
        self.value[target] = _mix(self.value[target] + value)

    def compute(self, rows: _Rows) -> None:
        """Run the computations of a step."""
        if not len(rows.rank):
            return
        target = rows.rank, rows.cell
        parts = self.parts[target]
        self._require(_some(parts), rows, "step {step} computes on what is undefined")
        finishing = np.array([name == "finish" for name in self.cut.schedule.kernels])[rows.other]
        self._require(~(finishing & self.finished[target]), rows, "step {step} finishes it again")
        if self.cut.schedule.kind in REDUCING:
            short = _some(parts ^ self.holders[rows.cell])
            self._require(~(finishing & short), rows, "step {step} finishes it before it is fully reduced")
        self.finished[target] |= finishing
        self.value[target] = _mix(self.value[target] ^ _mix(rows.other.astype(np.uint64)))

    def derive(self, step: int, work: _Derived) -> tuple[Bits, np.uint64]:
        """Find what a computation makes of what it reads: whose contributions are in it, and which expression it is."""
        parts, value = self.parts[work.rank, work.reads], self.value[work.rank, work.reads]
        undefined = np.flatnonzero(~_some(parts))
        if len(undefined):
            self.cut.fail(work.rank, int(work.reads[undefined[0]]), f"step {step} computes from what is undefined")
        mixed = np.full(1, work.kernel, np.uint64)
        for one in value:
            mixed = _mix(_mix(mixed) ^ one)
        return np.bitwise_or.reduce(parts, axis=0), mixed[0]

    def conclude(self) -> None:
        """Check what the ranks want at the end."""
        rank, cell = np.nonzero(self.cut.wanted)
        ends = self.parts[rank, cell]
        self._refuse(rank, cell, ~_some(ends), "is undefined at the end")
        if self.cut.schedule.kind in REDUCING:
            for row in np.flatnonzero(_some(ends ^ self.holders[cell])):
                lacking = self._ranks(self.holders[cell[row]] & ~ends[row])
                self.cut.fail(rank[row], cell[row], f"lacks the contributions of ranks {lacking} at the end")
            self._require_equal_bits()
        elif not any(self.cut.derived):  # what is computed from several is for its maker to prove
            for row in np.flatnonzero(_BITS[ends].sum(axis=1) > 1):
                mixed = self._ranks(ends[row])
                self.cut.fail(rank[row], cell[row], f"mixes the contributions of ranks {mixed} at the end")
        if "finish" in self.cut.schedule.kernels:
            self._refuse(rank, cell, ~self.finished[rank, cell], "is not finished at the end")

    def _ranks(self, bits: Bits) -> list[int]:
        return list(np.flatnonzero(np.unpackbits(bits, count=self.cut.schedule.world)).tolist())

    def _require_equal_bits(self) -> None:
        wanted = self.cut.wanted
        most = np.iinfo(np.uint64).max
        low, high = np.where(wanted, self.value, most).min(axis=0), np.where(wanted, self.value, 0).max(axis=0)
        for cell in np.flatnonzero(wanted.any(axis=0) & (low < high)).tolist():
            rank = int(np.flatnonzero(wanted[:, cell] & (self.value[:, cell] == high[cell]))[0])
            other = int(np.flatnonzero(wanted[:, cell] & (self.value[:, cell] == low[cell]))[0])
            self.cut.fail(rank, cell, f"is not reduced in the same order as on rank {other}, so bits may differ")

    def _require(self, good: Bools, rows: _Rows, what: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            told = what.format(step=rows.step[row], other=rows.other[row])
            self.cut.fail(int(rows.rank[row]), int(rows.cell[row]), told)

    def _refuse(self, rank: Ints, cell: Ints, wrong: Bools, what: str) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            self.cut.fail(int(rank[row]), int(cell[row]), what)


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
"""How many bits are set in each byte."""


def _some(sets: Bits | Bools) -> Bools:
    """Which rows have anything in them."""
    return np.asarray(sets.any(axis=1))


def _mix(values: Hashes) -> Hashes:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): spreads 64 bits over 64 bits."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
