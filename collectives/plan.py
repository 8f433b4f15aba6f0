"""First pass of the program compiler (`program`): what becomes of every range of the work buffer, in order of steps.

Follows the ranges of one rank's buffer (still in the caller's tensor, in staging, nowhere) and finds, for each segment,
where it is sent from, where it lands, and what must have happened before. Times are numbers of receives: "due 7" means
when the receive of that number, in the order in which they are waited for, has been dealt with; START: at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

from collectives.errors import UsageError
from collectives.instructions import NONE, Fold, Instruction, Lift, Notify, PostNote, PostSend, RunKernel
from collectives.intervals import IntervalMap
from collectives.region import Range
from collectives.schedule import Compute, LocalStep, Recv, Schedule, Send

START = -1
NEVER_USED = -2
"""As the time after which a range may be overwritten: from before the start."""

_GRAIN = 1024
"""Segments are cut at multiples of so many elements, so that vector instructions find them aligned."""


class Cutting(NamedTuple):
    """What the compiler needs to know besides schedule and rank; the same on all ranks but for `lift`."""

    segment: int
    """Transfers are cut into segments of about this many elements."""
    inline: int
    """A transfer of up to this many elements goes as notes."""
    note: int
    """Elements of such a note, about."""
    window: int
    """Receives that are posted ahead."""
    convert: bool
    """Staging has another dtype than the caller's tensor."""
    lift: bool
    """Copy wanted ranges that never leave the caller's tensor into staging as well."""


@dataclass(slots=True)
class Receive:
    """A segment to be received, with what it must wait for."""

    peer: int
    start: int
    stop: int
    step: int
    inline: bool
    landing_waits: frozenset[int] = frozenset()
    """Sends that must be over before the data may land in staging."""
    landing_after: int = NEVER_USED
    """When the data may land in staging, at the earliest."""
    fold: Fold | None = None
    """How it is reduced; its slot is not chosen yet."""
    scratch: bool = False
    """It lands in scratch memory."""
    fold_due: int = START
    fold_waits: frozenset[int] = frozenset()
    """Sends that must be over before it may be reduced into staging."""


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


_Cells = list[tuple[int, int, _Cell]]
_Segment = tuple[Recv, int, int, bool]


class Plan:
    """The result of the first pass.

    `due[t]` are the tasks of time t, in order; `send_step` and `send_due` tell of each send its step and when it is
    posted.
    """

    def __init__(self, schedule: Schedule, rank: int, cutting: Cutting) -> None:
        self.rank = rank
        self.cutting = cutting
        self.receives: list[Receive] = []
        self.due: dict[int, list[Task]] = {}
        self.send_step: list[int] = []
        self.send_due: list[int] = []
        self._cells: IntervalMap[_Cell | None] = IntervalMap(max(1, schedule.count), None)
        self._last_due: dict[int, int] = {}
        self._through: dict[int, int] = {}  # by step: when all receives up to it have been dealt with
        offset = 0
        for start, stop in schedule.held(rank):
            self._cells.assign(start, stop, _Cell(True, start - offset, START, ()))
            offset += stop - start
        for step in schedule.local(rank).steps:
            self._plan_step(step)
        self._finish(schedule.wanted(rank))

    def _plan_step(self, step: LocalStep) -> None:
        arrived = len(self.receives) - 1
        for send in step.sends:
            for start, stop, inline in self._cut(send):
                if start == stop:
                    waits = frozenset(range(len(self.send_step)))
                    self._when(self._in_turn(send.peer, arrived), Notify(send.peer), waits)
                else:
                    self._plan_send(send.peer, start, stop, inline, step.step)
        segments = self._interleaved(step.recvs)
        last = arrived + len(segments)
        defer = last if _crosses(step) else START
        for recv, start, stop, inline in segments:
            receive = Receive(recv.peer, start, stop, step.step, inline)
            if start < stop:
                if recv.combine:
                    self._plan_fold(receive, defer)
                else:
                    self._plan_copy(receive)
                ready = max(receive.fold_due, len(self.receives))
                self._cells.assign(start, stop, _Cell(False, 0, ready, ()))
            self.receives.append(receive)
        self._through[step.step] = last
        for compute in step.computes:
            self._plan_compute(compute, step.step)

    def _plan_send(self, peer: int, start: int, stop: int, inline: bool, step: int) -> None:
        cells = self._known(start, stop)
        if _in_one_piece(cells) and not self.cutting.convert:
            offset, ready = start - cells[0][2].shift, START
        else:
            cells = self._lifted(cells)
            offset, ready = NONE, max(cell.ready for _, _, cell in cells)
        due = self._in_turn(peer, ready)
        number = len(self.send_step)
        self.send_step.append(step)
        self.send_due.append(due)
        if offset == NONE:
            for low, high, cell in cells:
                self._cells.assign(low, high, cell._replace(readers=(*cell.readers, number)))
        post = PostNote if inline else PostSend
        self._when(due, post(number, peer, start, stop, offset))

    def _plan_copy(self, receive: Receive) -> None:
        """Plan to receive straight into staging, once nothing there is needed any more."""
        start, stop = receive.start, receive.stop
        old = [cell for _, _, cell in self._cells.pieces(start, stop) if cell is not None and not cell.held]
        receive.landing_waits = self._over(frozenset(send for cell in old for send in cell.readers), receive.step)
        receive.landing_after = max((cell.ready for cell in old), default=NEVER_USED)

    def _plan_fold(self, receive: Receive, defer: int) -> None:
        """Plan to reduce: what meets the caller's data first lands in staging itself, all else in scratch memory."""
        start, stop, now = receive.start, receive.stop, len(self.receives)
        cells = self._known(start, stop)
        theirs_first = receive.peer < self.rank
        if _in_one_piece(cells):
            receive.fold = Fold(start, stop, NONE, start - cells[0][2].shift, theirs_first)
            receive.fold_due = now
            return
        receive.scratch = True
        receive.fold = Fold(start, stop, NONE, NONE, theirs_first)
        receive.fold_due = max(now, defer)
        receive.fold_waits = _readers(self._lifted(cells))

    def _plan_compute(self, compute: Compute, step: int) -> None:
        whole = compute.start, compute.stop, False
        for start, stop, _ in self._cut(compute) if compute.elementwise else [whole]:
            cells = self._lifted(self._known(start, stop))
            readers = self._over(_readers(cells), step)
            due = max(cell.ready for _, _, cell in cells)
            for send in readers:  # not before it is posted, nor while its receiver may still wait for us
                due = max(due, self.send_due[send], self._through[self.send_step[send]])
            self._when(due, RunKernel(compute.kernel, start, stop), readers)
            self._cells.assign(start, stop, _Cell(False, 0, due, ()))

    def _finish(self, wanted: tuple[Range, ...]) -> None:
        """Lift what is wanted and still in the caller's tensor, a piece at a time between the receives."""
        if not self.cutting.lift:
            return
        due = START
        for start, stop in wanted:
            for low, high, cell in self._known(start, stop):
                if cell.held:
                    for first, last in _pieces(low, high, self.cutting.segment):
                        self._when(min(due, len(self.receives) - 1), Lift(first, last, first - cell.shift))
                        due += 1

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
        lifted = []
        for start, stop, cell in cells:
            if cell.held:
                self._when(START, Lift(start, stop, start - cell.shift))
                cell = _Cell(False, 0, START, ())  # noqa: PLW2901 - what it is from now on
                self._cells.assign(start, stop, cell)
            lifted.append((start, stop, cell))
        return lifted

    def _in_turn(self, peer: int, ready: int) -> int:
        """When a send to `peer` that is ready at that time may go: not before earlier ones to the same."""
        self._last_due[peer] = max(ready, self._last_due.get(peer, START))
        return self._last_due[peer]

    def _when(self, due: int, instruction: Instruction, waits: frozenset[int] = frozenset()) -> None:
        self.due.setdefault(due, []).append(Task(instruction, waits))

    def _cut(self, row: Send | Recv | Compute) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, stop, inline) of the segments of a transfer."""
        if row.start == row.stop:
            yield row.start, row.stop, True
            return
        inline = row.stop - row.start <= self.cutting.inline
        for start, stop in _pieces(row.start, row.stop, self.cutting.note if inline else self.cutting.segment):
            yield start, stop, inline

    def _interleaved(self, recvs: tuple[Recv, ...]) -> list[_Segment]:
        """The segments of a step's receives in the order in which they are dealt with.

        From one peer they come row by row. Several peers take turns, so that what they bring is sent on evenly; but
        where ranges overlap it is row by row throughout, because reductions happen in the order of rows.
        """
        by_peer: dict[int, list[_Segment]] = {}
        for recv in recvs:
            by_peer.setdefault(recv.peer, []).extend((recv, *segment) for segment in self._cut(recv))
        spans = sorted((recv.start, recv.stop) for recv in recvs if recv.start < recv.stop)
        if all(first[1] <= second[0] for first, second in pairwise(spans)):
            return [segment for turn in zip_longest(*by_peer.values()) for segment in turn if segment is not None]
        return [(recv, *segment) for recv in recvs for segment in self._cut(recv)]


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


def _readers(cells: _Cells) -> frozenset[int]:
    return frozenset(send for _, _, cell in cells for send in cell.readers)


def _pieces(start: int, stop: int, size: int) -> Iterator[Range]:
    """Cut [start, stop) into pieces of about `size`, as even as the grain allows."""
    parts = max(1, round((stop - start) / size))
    step = -(-(stop - start) // (parts * _GRAIN)) * _GRAIN
    for low in range(start, stop, step):
        yield low, min(low + step, stop)
