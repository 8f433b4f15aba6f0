"""Schedules: which elements move between which ranks, step by step, as a plain value.

A schedule works on one logical flat buffer of `count` elements that exists on every rank. An algorithm is a pure
function that returns a `Schedule`; `collectives.engine` runs it, `collectives.verify` proves it, a simulator times it.

Semantics, and what an engine may rely on once `verify` has accepted a schedule:

1. All transfers and computations of a step read the state that the *earlier* steps left. A transfer reads the range at
   the source and writes the same range at the destination: overwriting it, or with `combine` folding it in
   (`mine = mine op theirs`). A computation reads and writes its range, in place; or, where it names ranges that it
   reads, it sets its range, and those that it names besides, from what is in these (its own may be among them).
2. A rank may therefore run its part out of lockstep, guided by ranges alone: a send waits for the writes of its range
   in earlier steps; a write (receive or computation) waits for the reads and writes of its range in earlier steps and,
   if it combines, for the sends of its range in the same step.
3. The last clause is for `combine` only, whose data land in scratch memory first; so two ranks may exchange and
   reduce the same range in one step without waiting in a circle. No copied range overlaps a send of the same step and
   rank, and nothing that a computation writes overlaps anything else of the same step and rank: these may use the
   buffer directly. What a computation only reads may be sent, or read by others, in the same step.
4. Several combines of one step into the same range are folded in the order of their rows. Between two ranks,
   transfers take place in the order of steps and, within a step, of rows; `local` keeps it on both sides, so that one
   FIFO per pair of ranks suffices.
5. A transfer of an empty range is a notification: nothing moves, but the destination learns that the source got there.
   It is sent when all that its source does in earlier steps is done. Algorithms emit no other empty rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from collectives.errors import UsageError
from collectives.region import Ints, Ranges

Ints32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class Operands(NamedTuple):
    """What a computation works on besides its range. Without `reads` it works in place, and on nothing else."""

    reads: Ranges = ()
    """Ranges from which it sets all that it writes. Its own is among them if it depends on what was there."""
    writes: Ranges = ()
    """Further ranges that it sets."""


NO_OPERANDS = Operands()


@dataclass(frozen=True, slots=True)
class Computes:
    """The computations of a step, one a row: columns of equal length, read-only."""

    rank: Ints32
    kernel: Ints32
    """Index into `Schedule.kernels`."""
    start: Ints
    stop: Ints
    elementwise: Bools
    """Whether an engine may run the kernel on pieces of the range, in any order."""
    operands: tuple["Operands", ...] = ()
    """Of each row, what it reads and writes besides; empty if none of the rows does."""

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int, int, bool]] = (), operands: Iterable["Operands"] = ()) -> Self:
        """Columns from rows `(rank, kernel, start, stop, elementwise)`."""
        rank, kernel, start, stop, elementwise = zip(*rows, strict=True) if (rows := list(rows)) else ((),) * 5
        return cls(
            column(rank, np.int32),
            column(kernel, np.int32),
            column(start, np.int64),
            column(stop, np.int64),
            column(elementwise, np.bool_),
            tuple(operands),
        )

    def operands_of(self, row: int) -> "Operands":
        """What a row reads and writes besides."""
        return self.operands[row] if self.operands else NO_OPERANDS


@dataclass(frozen=True, slots=True)
class Step:
    """What happens at once: one transfer a row in columns of equal length, read-only, and computations."""

    src: Ints32
    dst: Ints32
    start: Ints
    stop: Ints
    combine: Bools
    """True: the destination reduces the data into its buffer. False: it overwrites."""
    computes: Computes

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[int, int, int, int, bool]] = (),
        computes: Iterable[tuple[int, int, int, int, bool]] = (),
        operands: Iterable[Operands] = (),
    ) -> Self:
        """Columns from rows `(src, dst, start, stop, combine)` and `(rank, kernel, start, stop, elementwise)`."""
        src, dst, start, stop, combine = zip(*rows, strict=True) if (rows := list(rows)) else ((),) * 5
        return cls(
            column(src, np.int32),
            column(dst, np.int32),
            column(start, np.int64),
            column(stop, np.int64),
            column(combine, np.bool_),
            Computes.of(computes, operands),
        )


class Send(NamedTuple):
    """Elements `[start, stop)` of the buffer go to `peer`."""

    peer: int
    start: int
    stop: int


class Recv(NamedTuple):
    """Elements `[start, stop)` come from `peer`, to be reduced into the buffer (`combine`) or to overwrite it."""

    peer: int
    start: int
    stop: int
    combine: bool


class Compute(NamedTuple):
    """The named kernel runs on elements `[start, stop)`, in place, or as `operands` say."""

    kernel: str
    start: int
    stop: int
    elementwise: bool
    operands: Operands = NO_OPERANDS


class LocalStep(NamedTuple):
    """What one rank does in step number `step` of the schedule; at least one of the three is not empty."""

    step: int
    sends: tuple[Send, ...]
    recvs: tuple[Recv, ...]
    computes: tuple[Compute, ...]


@dataclass(frozen=True, slots=True)
class LocalPart:
    """One rank's part of a schedule: the steps in which it has something to do, in order."""

    rank: int
    steps: tuple[LocalStep, ...]


class Program(Protocol):
    """Where a schedule's steps come from: explicit columns, or rules that produce them on demand."""

    def __len__(self) -> int:
        """Number of steps."""

    def step(self, index: int) -> Step:
        """All rows of a step."""

    def sends(self, rank: int) -> Iterator[tuple[int, Send]]:
        """`(step, row)` of what the rank sends; rows of one step in their order."""

    def recvs(self, rank: int) -> Iterator[tuple[int, Recv]]:
        """`(step, row)` of what the rank receives; rows of one step in their order."""

    def computes(self, rank: int) -> Iterator[tuple[int, int, int, int, bool, Operands]]:
        """`(step, kernel, start, stop, elementwise, operands)` of what the rank computes; rows of one step in order."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A collective operation as a value: immutable, and lazy, so that thousands of ranks fit in memory.

    Build one with a function of `collectives.algorithms` or with `from_steps`. Equality is identity.
    """

    kind: str
    """What it achieves: "all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "exchange"..."""
    algorithm: str
    world: int
    count: int
    """Elements of the work buffer."""
    kernels: tuple[str, ...]
    program: Program = field(repr=False)
    holding: Callable[[int], Ranges] = field(repr=False)
    wanting: Callable[[int], Ranges] = field(repr=False)
    _parts: dict[int, LocalPart] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.world < 1 or self.count < 0:
            raise UsageError(f"a schedule needs world >= 1 and count >= 0, not world {self.world}, count {self.count}")

    def __len__(self) -> int:
        """Number of steps, on all ranks together; 0 where there is nothing to do."""
        return len(self.program)

    def __bool__(self) -> bool:
        """True, also for a schedule of no steps."""
        return True

    def step(self, index: int) -> Step:
        """All rows of step `index`, made on demand and not kept.

        Raises:
            IndexError: there is no such step.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of a schedule of {len(self)} steps")
        return self.program.step(index)

    def local(self, rank: int) -> LocalPart:
        """The rows in which `rank` sends, receives or computes; made at the first call and kept.

        Raises:
            UsageError: no such rank.

        """
        part = self._parts.get(rank)
        if part is None:
            part = self._parts[self._known(rank)] = self._localize(rank)
        return part

    def held(self, rank: int) -> Ranges:
        """The ranges of the buffer that `rank` contributes at the start; the rest of its buffer is undefined."""
        return tuple((start, stop) for start, stop in self.holding(self._known(rank)) if start < stop)

    def wanted(self, rank: int) -> Ranges:
        """The ranges that must be final on `rank` at the end; the rest of its buffer is undefined then."""
        return tuple((start, stop) for start, stop in self.wanting(self._known(rank)) if start < stop)

    @classmethod
    def from_steps(
        cls,
        kind: str,
        algorithm: str,
        world: int,
        count: int,
        steps: Iterable[Step],
        held: Sequence[Ranges],
        wanted: Sequence[Ranges],
        kernels: tuple[str, ...] = (),
    ) -> Self:
        """Build a schedule of explicit columns; `held[r]` and `wanted[r]` are the ranges of rank `r`.

        This checks the form of the columns, not what they achieve: see `collectives.verify`.

        Raises:
            UsageError: columns of unequal length, a rank, range or kernel that does not exist, a transfer from a
                rank to itself, an empty computation, or not one entry a rank in `held` and `wanted`.

        """
        for name, ranges in (("held", held), ("wanted", wanted)):
            if len(ranges) != world:
                raise UsageError(f"{name} has {len(ranges)} entries for a world of {world}; give one a rank")
            for rank, mine in enumerate(ranges):
                if any(not 0 <= start <= stop <= count for start, stop in mine):
                    raise UsageError(f"{name}[{rank}] = {mine} does not lie within [0, {count})")
        checked = tuple(_checked(index, step, world, count, len(kernels)) for index, step in enumerate(steps))
        held, wanted = tuple(map(tuple, held)), tuple(map(tuple, wanted))
        return cls(kind, algorithm, world, count, kernels, _Columns(checked), held.__getitem__, wanted.__getitem__)

    def _known(self, rank: int) -> int:
        if not 0 <= rank < self.world:
            raise UsageError(f"rank {rank} is not in a world of {self.world}")
        return rank

    def _localize(self, rank: int) -> LocalPart:
        sends: defaultdict[int, list[Send]] = defaultdict(list)
        recvs: defaultdict[int, list[Recv]] = defaultdict(list)
        computes: defaultdict[int, list[Compute]] = defaultdict(list)
        for index, send in self.program.sends(rank):
            sends[index].append(send)
        for index, recv in self.program.recvs(rank):
            recvs[index].append(recv)
        for index, kernel, start, stop, elementwise, operands in self.program.computes(rank):
            computes[index].append(Compute(self.kernels[kernel], start, stop, elementwise, operands))
        busy = sorted({*sends, *recvs, *computes})
        none: tuple[()] = ()
        return LocalPart(
            rank,
            tuple(
                LocalStep(i, tuple(sends.get(i, none)), tuple(recvs.get(i, none)), tuple(computes.get(i, none)))
                for i in busy
            ),
        )


def column(values: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A read-only copy of `values` as a column of this dtype."""
    made = np.array(values, dtype=dtype)
    made.flags.writeable = False
    return made


@dataclass(frozen=True, slots=True)
class _Columns:
    """A program of explicit columns."""

    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def step(self, index: int) -> Step:
        return self.steps[index]

    def sends(self, rank: int) -> Iterator[tuple[int, Send]]:
        for index, step in enumerate(self.steps):
            rows = np.flatnonzero(step.src == rank)
            for row in zip(step.dst[rows].tolist(), step.start[rows].tolist(), step.stop[rows].tolist(), strict=True):
                yield index, Send(*row)

    def recvs(self, rank: int) -> Iterator[tuple[int, Recv]]:
        for index, step in enumerate(self.steps):
            rows = np.flatnonzero(step.dst == rank)
            columns = (step.src[rows], step.start[rows], step.stop[rows], step.combine[rows])
            for row in zip(*(values.tolist() for values in columns), strict=True):
                yield index, Recv(*row)

    def computes(self, rank: int) -> Iterator[tuple[int, int, int, int, bool, Operands]]:
        for index, step in enumerate(self.steps):
            work = step.computes
            rows = np.flatnonzero(work.rank == rank)
            columns = (rows, work.kernel[rows], work.start[rows], work.stop[rows], work.elementwise[rows])
            for row, kernel, start, stop, elementwise in zip(*(values.tolist() for values in columns), strict=True):
                yield index, kernel, start, stop, elementwise, work.operands_of(row)


def _checked(index: int, step: Step, world: int, count: int, kernels: int) -> Step:
    """The step with its columns copied, after a check of their form."""
    work = step.computes
    transfers = (step.src, step.dst, step.start, step.stop, step.combine)
    computations = (work.rank, work.kernel, work.start, work.stop, work.elementwise)
    for what, columns in (("transfers", transfers), ("computes", computations)):
        if {np.shape(values) for values in columns} != {(len(columns[0]),)}:
            raise UsageError(f"step {index}: the columns of {what} must be flat and of equal length")
    _refuse(index, "transfer", (step.src < 0) | (step.src >= world), f"comes from no rank of a world of {world}")
    _refuse(index, "transfer", (step.dst < 0) | (step.dst >= world), f"goes to no rank of a world of {world}")
    _refuse(index, "transfer", step.src == step.dst, "goes from a rank to itself")
    _refuse(index, "transfer", _outside(step.start, step.stop, count), f"has a range that is not within [0, {count})")
    _refuse(index, "compute", (work.rank < 0) | (work.rank >= world), f"is on no rank of a world of {world}")
    _refuse(index, "compute", (work.kernel < 0) | (work.kernel >= kernels), f"names none of the {kernels} kernels")
    _refuse(index, "compute", _outside(work.start, work.stop, count), f"has a range that is not within [0, {count})")
    _refuse(index, "compute", work.start == work.stop, "has an empty range")
    _check_operands(index, work, count)
    return Step(
        column(step.src, np.int32),
        column(step.dst, np.int32),
        column(step.start, np.int64),
        column(step.stop, np.int64),
        column(step.combine, np.bool_),
        Computes(
            column(work.rank, np.int32),
            column(work.kernel, np.int32),
            column(work.start, np.int64),
            column(work.stop, np.int64),
            column(work.elementwise, np.bool_),
            tuple(Operands(tuple(reads), tuple(writes)) for reads, writes in work.operands),
        ),
    )


def _check_operands(index: int, work: Computes, count: int) -> None:
    if len(work.operands) not in (0, len(work.rank)):
        raise UsageError(f"step {index}: {len(work.operands)} operands for {len(work.rank)} computes")
    for row, (reads, writes) in enumerate(work.operands):
        if any(not 0 <= start < stop <= count for start, stop in (*reads, *writes)):
            raise UsageError(f"step {index}: compute {row} has an operand that is not within [0, {count}), or is empty")
        if (reads and work.elementwise[row]) or (writes and not reads):
            raise UsageError(f"step {index}: compute {row} with operands must read some, and not be elementwise")


def _outside(start: Ints, stop: Ints, count: int) -> Bools:
    return (start < 0) | (stop < start) | (stop > count)


def _refuse(index: int, what: str, wrong: Bools, why: str) -> None:
    if wrong.any():
        raise UsageError(f"step {index}: {what} {int(wrong.argmax())} {why}")
