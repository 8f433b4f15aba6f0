"""First pass of the program compiler (`program`): what becomes of every range of the work buffer, in order of steps.

Follows the ranges of one rank's buffer (still in the caller's tensor, in staging, nowhere) and finds, for each segment,
where it is sent from, where it lands, and what must have happened before. Times are numbers of receives: "due 7" means
when the receive of that number, in the order in which they are waited for, has been dealt with; START: at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from collectives.cutting import Cutting, Message, arranged, messages, pieces, segments
from collectives.errors import UsageError
from collectives.footprint import merged
from collectives.instructions import (
    CALLER,
    SCRATCH,
    STAGING,
    Fold,
    Instruction,
    Lift,
    Notify,
    PostNote,
    PostPack,
    PostSend,
    RunKernel,
    Where,
)
from collectives.intervals import IntervalMap
from collectives.region import Range
from collectives.schedule import Compute, LocalStep, Recv, Schedule, Send

START = -1
NEVER_USED = -2
"""As the time after which a range may be overwritten: from before the start."""


@dataclass(slots=True)
class Receive:
    """A segment to be received, or several rows in one note, with what it must wait for.

    Ranges of staging are those of the work buffer, those of scratch memory count from the start of a slot.
    """

    peer: int
    step: int
    inline: bool
    into: list[Where] = field(default_factory=list)
    """Where the rows land; empty for a notification."""
    landing_waits: frozenset[int] = frozenset()
    """Sends that must be over before the data may land in staging."""
    landing_after: int = NEVER_USED
    """When the data may land in staging, at the earliest."""
    scratch: int = 0
    """Elements that land in scratch memory."""


class Folding(NamedTuple):
    """A reduction of the receive of that number, after these sends are over."""

    receive: int
    fold: Fold
    waits: frozenset[int]


class Task(NamedTuple):
    """Something to do at a certain time, after these sends are over."""

    instruction: Instruction
    waits: frozenset[int]


class _Cell(NamedTuple):
    """What is known of a range of the work buffer."""

    held: bool
    """The data are in the caller's tensor, `shift` elements further to the front; else in staging."""
    shift: int
    ready: int
    """When the data are there."""
    readers: tuple[int, ...]
    """Numbers of the sends that read this piece of staging."""
    used: int = NEVER_USED
    """When the last computation has read it."""


_Cells = list[tuple[int, int, _Cell]]


class Plan:
    """The result of the first pass.

    `due[t]` are the tasks of time t, in order, and `folds[t]` the reductions before them; `send_step` and `send_due`
    tell of each send its step and when it is posted; `result` is where the wanted ranges are at the end, in order.
    """

    def __init__(self, schedule: Schedule, rank: int, cutting: Cutting) -> None:
        self.rank = rank
        self.cutting = cutting
        self.receives: list[Receive] = []
        self.due: dict[int, list[Task]] = {}
        self.folds: dict[int, list[Folding]] = {}
        self.send_step: list[int] = []
        self.send_due: list[int] = []
        self._count = schedule.count
        self._cells: IntervalMap[_Cell | None] = IntervalMap(max(1, schedule.count), None)
        self._last_due: dict[int, int] = {}
        self._through: dict[int, int] = {}  # by step: when all receives up to it have been dealt with
        offset = 0
        for start, stop in schedule.held(rank):
            self._cells.assign(start, stop, _Cell(True, start - offset, START, ()))
            offset += stop - start
        for step in schedule.local(rank).steps:
            self._plan_step(step)
        self.result = self._finish(schedule.wanted(rank))

    def kept(self) -> Iterator[Range]:
        """The ranges of the work buffer that are ever in staging, in order."""
        cells = self._cells.pieces(0, self._count)
        staged = (Where(STAGING, start, stop) for start, stop, cell in cells if cell is not None and not cell.held)
        for _, start, stop in merged(staged):
            yield start, stop

    def _plan_step(self, step: LocalStep) -> None:
        arrived = len(self.receives) - 1
        for sending in messages(step.sends, self.cutting):
            if sending.rows[0].start < sending.rows[0].stop:
                self._plan_send(sending, step.step)
            else:
                waits = frozenset(range(len(self.send_step)))
                self._when(self._in_turn(sending.peer, arrived), Notify(sending.peer), waits)
        self._plan_receives(step)
        self._through[step.step] = len(self.receives) - 1
        for compute in step.computes:
            self._plan_compute(compute, step.step)

    def _plan_send(self, message: Message[Send], step: int) -> None:
        data: list[Where] = []
        ready, lifted, number = START, _Cells(), len(self.send_step)
        for row in message.rows:
            cells = self._known(row.start, row.stop)
            if _in_one_piece(cells) and not self.cutting.convert:
                data.append(_in_caller(cells))
                continue
            cells = self._lifted(cells)
            data.append(Where(STAGING, row.start, row.stop))
            ready = max(ready, *(cell.ready for _, _, cell in cells))
            lifted += cells
        due = self._in_turn(message.peer, ready)
        self.send_step.append(step)
        self.send_due.append(due)
        for low, high, cell in lifted:
            self._cells.assign(low, high, cell._replace(readers=(*cell.readers, number)))
        if len(data) > 1:
            self._when(due, PostPack(number, message.peer, tuple(data)))
        else:
            post = PostNote if message.inline else PostSend
            self._when(due, post(number, message.peer, data[0]))

    def _plan_receives(self, step: LocalStep) -> None:
        """Plan the receives of a step in the order of messages, and what becomes of them in the order of rows."""
        first = len(self.receives)
        arrivals, apart = arranged(step.recvs, self.cutting)
        last = first + len(arrivals) - 1
        # A note that brings several rows may bring one too early where the order of rows counts.
        early = START if apart or all(len(message.rows) == 1 for message in arrivals) else last
        defer = last if _crosses(step) else early
        rows = []
        for index, message in enumerate(arrivals, first):
            self.receives.append(Receive(message.peer, step.step, message.inline))
            rows += [(number, index, row) for number, row in zip(message.numbers, message.rows, strict=True)]
        for _, index, row in sorted(rows, key=lambda entry: entry[0]):
            if row.start == row.stop:
                continue
            ready = self._plan_fold(row, index, early, defer) if row.combine else self._plan_copy(row, index)
            self._cells.assign(row.start, row.stop, _Cell(False, 0, ready, ()))

    def _plan_copy(self, row: Recv, index: int) -> int:
        """Plan to receive straight into staging, once nothing there is needed any more; return when it is there."""
        receive = self.receives[index]
        cells = self._cells.pieces(row.start, row.stop)
        old = [cell for _, _, cell in cells if cell is not None and not cell.held]
        receive.into.append(Where(STAGING, row.start, row.stop))
        receive.landing_waits |= self._over(frozenset(send for cell in old for send in cell.readers), receive.step)
        receive.landing_after = max([receive.landing_after, *(max(cell.ready, cell.used) for cell in old)])
        return index

    def _plan_fold(self, row: Recv, index: int, early: int, defer: int) -> int:
        """Plan to reduce: what meets the caller's data first lands in staging itself, all else in scratch memory.

        Returns when it will be done: not before `early`, or `defer` where it waits for sends.
        """
        receive, target = self.receives[index], Where(STAGING, row.start, row.stop)
        cells = self._known(row.start, row.stop)
        waits: frozenset[int] = frozenset()
        if _in_one_piece(cells):
            theirs, mine, due = target, _in_caller(cells), max(index, early)
        else:
            waits = _readers(self._lifted(cells))
            size = row.stop - row.start
            theirs, mine, due = Where(SCRATCH, receive.scratch, receive.scratch + size), target, max(index, defer)
            receive.scratch += size
        receive.into.append(theirs)
        operands = (theirs, mine) if row.peer < self.rank else (mine, theirs)
        self.folds.setdefault(due, []).append(Folding(index, Fold(*operands, target), waits))
        return due

    def _plan_compute(self, compute: Compute, step: int) -> None:
        if compute.operands.reads:
            self._plan_derived(compute, step)
            return
        whole = compute.start, compute.stop, False
        for start, stop, _ in segments(compute, self.cutting) if compute.elementwise else [whole]:
            cells = self._lifted(self._known(start, stop))
            readers = self._over(_readers(cells), step)
            due = self._after(readers, [max(cell.ready, cell.used) for _, _, cell in cells])
            self._when(due, RunKernel(compute.kernel, Where(STAGING, start, stop)), readers)
            self._cells.assign(start, stop, _Cell(False, 0, due, ()))

    def _plan_derived(self, compute: Compute, step: int) -> None:
        """Plan a computation that sets ranges from others, which may lie in the caller's tensor."""
        reads, ready = [], [START]
        for start, stop in compute.operands.reads:
            cells = self._known(start, stop)
            if _in_one_piece(cells):
                reads.append(_in_caller(cells))
                continue
            reads.append(Where(STAGING, start, stop))
            ready += [cell.ready for _, _, cell in self._lifted(cells)]
        written = ((compute.start, compute.stop), *compute.operands.writes)
        old = [cell for span in written for _, _, cell in self._cells.pieces(*span) if cell and not cell.held]
        readers = self._over(frozenset(send for cell in old for send in cell.readers), step)
        due = self._after(readers, ready + [max(cell.ready, cell.used) for cell in old])
        on, *others = (Where(STAGING, *span) for span in written)
        self._when(due, RunKernel(compute.kernel, on, tuple(others), tuple(reads)), readers)
        for start, stop in compute.operands.reads:
            for low, high, cell in self._known(start, stop):
                self._cells.assign(low, high, cell._replace(used=max(cell.used, due)))
        for span in written:
            self._cells.assign(*span, _Cell(False, 0, due, ()))

    def _after(self, sends: frozenset[int], times: list[int]) -> int:
        """The last of these times, not before a send is posted, nor while its receiver may still wait for us."""
        return max([*times, *(max(self.send_due[send], self._through[self.send_step[send]]) for send in sends)])

    def _finish(self, wanted: tuple[Range, ...]) -> list[Where]:
        """Lift what is wanted and still in the caller's tensor, a piece at a time between the receives."""
        due = START
        result = []
        for start, stop in wanted:
            for low, high, cell in self._known(start, stop):
                if cell.held and not self.cutting.lift:
                    result.append(Where(CALLER, low - cell.shift, high - cell.shift))
                    continue
                result.append(Where(STAGING, low, high))
                if cell.held:
                    for first, last in pieces(low, high, self.cutting.segment):
                        self._lift(min(due, len(self.receives) - 1), first, last, cell)
                        due += 1
        return result

    def _over(self, sends: frozenset[int], step: int) -> frozenset[int]:
        """These sends, after a check that none belongs to the step that is going to change what they read."""
        if any(self.send_step[send] == step for send in sends):
            raise UsageError(f"step {step} of the schedule changes a range on rank {self.rank} that it also sends")
        return sends

    def _known(self, start: int, stop: int) -> _Cells:
        found = []
        for low, high, cell in self._cells.pieces(start, stop):
            if cell is None:
                raise UsageError(
                    f"the schedule reads elements [{low}, {high}) on rank {self.rank} before anything was put there"
                )
            found.append((low, high, cell))
        return found

    def _lifted(self, cells: _Cells) -> _Cells:
        """The same cells after what is in the caller's tensor has been copied to staging."""
        return [
            (start, stop, self._lift(START, start, stop, cell) if cell.held else cell) for start, stop, cell in cells
        ]

    def _lift(self, due: int, start: int, stop: int, cell: _Cell) -> _Cell:
        """Copy a range of the caller's tensor to staging; returns what it is from then on."""
        source = Where(CALLER, start - cell.shift, stop - cell.shift)
        self._when(due, Lift(source, Where(STAGING, start, stop)))
        lifted = _Cell(False, 0, due, ())
        self._cells.assign(start, stop, lifted)
        return lifted

    def _in_turn(self, peer: int, ready: int) -> int:
        """When a send to `peer` that is ready at that time may go: not before earlier ones to the same."""
        self._last_due[peer] = max(ready, self._last_due.get(peer, START))
        return self._last_due[peer]

    def _when(self, due: int, instruction: Instruction, waits: frozenset[int] = frozenset()) -> None:
        self.due.setdefault(due, []).append(Task(instruction, waits))


def _crosses(step: LocalStep) -> bool:
    """Whether reductions of a step must wait until all its receives are here.

    A reduction waits for the sends that read its range. If two ranks do so in unlike order, each waits for the other to
    come to a later receive. This cannot happen where the two exchange the same ranges and nothing else.
    """
    sends = [(send.peer, send.start, send.stop) for send in step.sends]
    recvs = [(recv.peer, recv.start, recv.stop) for recv in step.recvs]
    if sends == recvs and len({peer for peer, _, _ in sends}) == 1:
        return False
    combined = [recv for recv in step.recvs if recv.combine]
    return any(recv.start < send.stop and send.start < recv.stop for recv in combined for send in step.sends)


def _in_one_piece(cells: _Cells) -> bool:
    """Whether all data are in the caller's tensor, one behind the other."""
    return all(cell.held and cell.shift == cells[0][2].shift for _, _, cell in cells)


def _in_caller(cells: _Cells) -> Where:
    """Where data that are in one piece lie in the caller's tensor."""
    shift = cells[0][2].shift
    return Where(CALLER, cells[0][0] - shift, cells[-1][1] - shift)


def _readers(cells: _Cells) -> frozenset[int]:
    return frozenset(send for _, _, cell in cells for send in cell.readers)
