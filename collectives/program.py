"""Compiles one rank's part of a schedule into a linear program for the engine.

The compiler cuts transfers into segments, follows what becomes of every range of the work buffer (still in the caller's
tensor, written to staging, nowhere) and so decides, once for each schedule and not at each run:

- what is sent straight from the caller's tensor, and what must be copied into staging first;
- where a received segment lands: in staging (to be overwritten, or reduced with the caller's data that it meets for the
  first time) or in scratch memory (to be reduced with what staging holds already);
- the order of everything. Receives are waited for in the order of steps; a segment is reduced when it has arrived and
  sent on at once; the next receives are posted meanwhile, as far as no earlier send still reads their memory.

Both ends of a link cut a transfer alike and post in the same order, because all follows from the schedule. The order
cannot deadlock: a wait at step s is for a receive of step s at most, or for a send of an earlier step or of a reduction
of the same step, and all sends of steps up to s have been posted by then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

from collectives.errors import UsageError
from collectives.instructions import (
    NONE,
    AwaitReceive,
    AwaitSend,
    Fold,
    Instruction,
    Lift,
    Notify,
    PostNote,
    PostReceive,
    PostSend,
    RunKernel,
    TakeNote,
)
from collectives.intervals import IntervalMap
from collectives.region import Range
from collectives.schedule import Compute, LocalStep, Recv, Schedule, Send

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


@dataclass(frozen=True, slots=True)
class Program:
    """What a rank does, in order. Needs `slots` pieces of scratch memory of `slot_size` elements."""

    instructions: tuple[Instruction, ...]
    slots: int
    slot_size: int


class _Cell(NamedTuple):
    """What is known of a range of the work buffer."""

    held: bool
    """The data are in the caller's tensor, `shift` elements further to the front; else in staging."""
    shift: int
    ready: int
    """Number of the receive after which the data are there; NONE: from the start."""
    readers: tuple[int, ...]
    """Numbers of the sends that read this piece of staging."""


class _Receive(NamedTuple):
    """A segment to be received, with what it must wait for."""

    peer: int
    start: int
    stop: int
    step: int
    inline: bool
    slot: int
    landing_waits: frozenset[int]
    """Sends that must be over before the data may land."""
    landing_after: int
    """Receive that must have been dealt with before the data may land."""
    fold: Fold | None
    fold_waits: frozenset[int]


class _Task(NamedTuple):
    """Something to do when a certain receive has been dealt with, after these sends are over."""

    instruction: Instruction
    waits: frozenset[int]


_NO_SENDS: frozenset[int] = frozenset()


def compile_program(schedule: Schedule, rank: int, cutting: Cutting) -> Program:
    """Compile what `rank` does in `schedule`.

    Raises:
        UsageError: the schedule reads a range that is nowhere on this rank (see `collectives.verify`).

    """
    return _Order(_Plan(schedule, rank, cutting)).program()


class _Plan:
    """First pass, in the order of steps: segments, where they land, and what depends on what."""

    def __init__(self, schedule: Schedule, rank: int, cutting: Cutting) -> None:
        self.rank = rank
        self.cutting = cutting
        self.receives: list[_Receive] = []
        self.due: dict[int, list[_Task]] = {NONE: []}
        self.send_steps: dict[int, int] = {}
        self.send_due: dict[int, int] = {}
        self.slots = 0
        self.slot_size = 0
        self._cells: IntervalMap[_Cell | None] = IntervalMap(max(1, schedule.count), None)
        self._last_due: dict[int, int] = {}
        offset = 0
        for start, stop in schedule.held(rank):
            self._cells.assign(start, stop, _Cell(True, start - offset, NONE, ()))
            offset += stop - start
        for step in schedule.local(rank).steps:
            self._plan_step(step)
        self._finish(schedule.wanted(rank))

    def _plan_step(self, step: LocalStep) -> None:
        arrived = len(self.receives) - 1
        for send in step.sends:
            for start, stop, inline in self._cut(send):
                if start == stop:
                    waits = frozenset(self.send_steps)
                    self._when(self._in_turn(send.peer, arrived), Notify(send.peer), waits)
                else:
                    self._plan_send(send.peer, start, stop, inline, step.step)
        for recv, start, stop, inline in self._interleaved(step.recvs):
            self._plan_receive(recv, start, stop, inline, step.step)
        for compute in step.computes:
            self._plan_compute(compute)

    def _plan_send(self, peer: int, start: int, stop: int, inline: bool, step: int) -> None:
        cells = self._known(start, stop)
        if self._in_one_piece(cells) and not self.cutting.convert:
            offset, ready = start - cells[0][2].shift, NONE
        else:
            self._lift(cells)
            cells = self._known(start, stop)
            offset, ready = NONE, max(cell.ready for _, _, cell in cells)
        due = self._in_turn(peer, ready)
        index = len(self.send_steps)
        self.send_steps[index] = step
        self.send_due[index] = due
        if offset == NONE:
            for low, high, cell in cells:
                self._cells.assign(low, high, cell._replace(readers=(*cell.readers, index)))
        post = PostNote if inline else PostSend
        self._when(due, post(index, peer, start, stop, offset))

    def _plan_receive(self, recv: Recv, start: int, stop: int, inline: bool, step: int) -> None:
        slot, after, fold = NONE, NONE, None
        landing_waits = fold_waits = _NO_SENDS
        if start < stop and recv.combine:
            cells = self._known(start, stop)
            theirs_first = recv.peer < self.rank
            if self._in_one_piece(cells):
                fold = Fold(start, stop, NONE, start - cells[0][2].shift, theirs_first)
            else:
                self._lift(cells)
                slot = self._new_slot(stop - start)
                fold = Fold(start, stop, slot, NONE, theirs_first)
                fold_waits = _readers(cells)
        elif start < stop:
            written = [cell for _, _, cell in self._cells.pieces(start, stop) if cell is not None and not cell.held]
            landing_waits = frozenset(send for cell in written for send in cell.readers)
            after = max((cell.ready for cell in written), default=NONE)
            if any(self.send_steps[send] == step for send in landing_waits):
                raise UsageError(f"step {step} sends and overwrites elements of [{start}, {stop}) on rank {self.rank}")
        if start < stop:
            self._cells.assign(start, stop, _Cell(False, 0, len(self.receives), ()))
        self.receives.append(
            _Receive(recv.peer, start, stop, step, inline, slot, landing_waits, after, fold, fold_waits)
        )

    def _plan_compute(self, compute: Compute) -> None:
        whole = compute.start, compute.stop, False
        for start, stop, _ in self._cut(compute) if compute.elementwise else [whole]:
            cells = self._known(start, stop)
            self._lift(cells)
            readers = _readers(cells)
            ready = max([cell.ready for _, _, cell in cells] + [self.send_due[send] for send in readers])
            self._when(ready, RunKernel(compute.kernel, start, stop), readers)
            self._cells.assign(start, stop, _Cell(False, 0, ready, ()))

    def _finish(self, wanted: tuple[Range, ...]) -> None:
        """Lift what is wanted and still in the caller's tensor, a piece at a time between the receives."""
        due = NONE
        for start, stop in wanted:
            for low, high, cell in list(self._known(start, stop)):
                if not cell.held or not self.cutting.lift:
                    continue
                for first, last in _pieces(low, high, self.cutting.segment):
                    self._when(min(due, len(self.receives) - 1), Lift(first, last, first - cell.shift))
                    due += 1

    def _known(self, start: int, stop: int) -> list[tuple[int, int, _Cell]]:
        found = []
        for low, high, cell in self._cells.pieces(start, stop):
            if cell is None:
                raise UsageError(
                    f"the schedule reads elements [{low}, {high}) on rank {self.rank} before anything was put there"
                )
            found.append((low, high, cell))
        return found

    @staticmethod
    def _in_one_piece(cells: list[tuple[int, int, _Cell]]) -> bool:
        """Whether all data are in the caller's tensor, one behind the other."""
        return all(cell.held and cell.shift == cells[0][2].shift for _, _, cell in cells)

    def _lift(self, cells: list[tuple[int, int, _Cell]]) -> None:
        for start, stop, cell in cells:
            if cell.held:
                self._when(NONE, Lift(start, stop, start - cell.shift))
                self._cells.assign(start, stop, _Cell(False, 0, NONE, ()))

    def _in_turn(self, peer: int, ready: int) -> int:
        """When a send to `peer` that is ready after receive `ready` may go: not before earlier sends to the same."""
        self._last_due[peer] = max(ready, self._last_due.get(peer, NONE))
        return self._last_due[peer]

    def _when(self, ready: int, instruction: Instruction, waits: frozenset[int] = _NO_SENDS) -> None:
        self.due.setdefault(ready, []).append(_Task(instruction, waits))

    def _new_slot(self, size: int) -> int:
        self.slot_size = max(self.slot_size, size)
        self.slots += 1
        return (self.slots - 1) % (self.cutting.window + 1)

    def _cut(self, row: Send | Recv | Compute) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, stop, inline) of the segments of a transfer."""
        if row.start == row.stop:
            yield row.start, row.stop, True
            return
        inline = row.stop - row.start <= self.cutting.inline
        for start, stop in _pieces(row.start, row.stop, self.cutting.note if inline else self.cutting.segment):
            yield start, stop, inline

    def _interleaved(self, recvs: tuple[Recv, ...]) -> list[tuple[Recv, int, int, bool]]:
        """The segments of a step's receives in the order in which they are dealt with.

        From one peer they come row by row. Several peers take turns, so that what they bring is sent on evenly; but
        where ranges overlap it is row by row throughout, because reductions happen in the order of rows.
        """
        by_peer: dict[int, list[tuple[Recv, int, int, bool]]] = {}
        for recv in recvs:
            by_peer.setdefault(recv.peer, []).extend((recv, *segment) for segment in self._cut(recv))
        spans = sorted((recv.start, recv.stop) for recv in recvs if recv.start < recv.stop)
        if all(first[1] <= second[0] for first, second in pairwise(spans)):
            return [segment for turn in zip_longest(*by_peer.values()) for segment in turn if segment is not None]
        return [(recv, *segment) for recv in recvs for segment in self._cut(recv)]


class _Order:
    """Second pass, in the order of receives: when everything happens."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._made: list[Instruction] = []
        self._waited: set[int] = set()
        self._did: set[int] = set()
        self._posted = 0
        self._slots_in_use = 0
        self._slots = min(plan.slots, plan.cutting.window + 1)

    def program(self) -> Program:
        plan = self._plan
        self._post_ahead(NONE)
        self._do_due(NONE)
        self._post_ahead(NONE)
        for index, receive in enumerate(plan.receives):
            if self._posted == index:
                self._post(index)
            self._made.append(self._arrival(index, receive))
            self._post_ahead(index - 1)
            if receive.fold is not None:
                self._await_sends(receive.fold_waits)
                self._made.append(receive.fold)
                self._slots_in_use -= receive.slot != NONE
            self._do_due(index)
            self._post_ahead(index)
        self._await_sends(frozenset(plan.send_steps))
        return Program(tuple(self._made), self._slots, plan.slot_size)

    def _post_ahead(self, done: int) -> None:
        """Post the next receives, as far as the window allows and nothing that is in use would be overwritten."""
        plan = self._plan
        while self._posted < min(len(plan.receives), done + 1 + plan.cutting.window):
            receive = plan.receives[self._posted]
            step = plan.receives[done + 1].step
            if receive.slot != NONE and self._slots_in_use == self._slots:
                return
            if receive.inline:
                self._post(self._posted)
                continue
            if receive.landing_after > done:
                return
            waits = receive.landing_waits - self._waited
            if any(plan.send_steps[send] >= step or plan.send_due[send] not in self._did for send in waits):
                return  # its time will come: waiting for it now might be waiting for a peer that waits for us
            self._post(self._posted)

    def _post(self, index: int) -> None:
        """Post a receive; of one that comes as a note, only take its slot."""
        receive = self._plan.receives[index]
        self._posted += 1
        self._slots_in_use += receive.slot != NONE
        if not receive.inline:
            self._await_sends(receive.landing_waits)
            self._made.append(PostReceive(index, receive.peer, receive.start, receive.stop, receive.slot))

    def _arrival(self, index: int, receive: _Receive) -> Instruction:
        if not receive.inline:
            return AwaitReceive(index)
        self._await_sends(receive.landing_waits)
        return TakeNote(receive.peer, receive.start, receive.stop, receive.slot)

    def _do_due(self, done: int) -> None:
        self._did.add(done)
        for task in self._plan.due.get(done, ()):
            self._await_sends(task.waits)
            self._made.append(task.instruction)

    def _await_sends(self, sends: frozenset[int]) -> None:
        for send in sorted(sends - self._waited):
            self._waited.add(send)
            self._made.append(AwaitSend(send))


def _readers(cells: list[tuple[int, int, _Cell]]) -> frozenset[int]:
    return frozenset(send for _, _, cell in cells for send in cell.readers)


def _pieces(start: int, stop: int, size: int) -> Iterator[Range]:
    """Cut [start, stop) into pieces of about `size`, as even as the grain allows."""
    parts = max(1, round((stop - start) / size))
    step = -(-(stop - start) // (parts * _GRAIN)) * _GRAIN
    for low in range(start, stop, step):
        yield low, min(low + step, stop)
