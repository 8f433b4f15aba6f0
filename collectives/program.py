"""Compiles one rank's part of a schedule into a linear program for the engine, once for each schedule.

The first pass (`plan`) finds what depends on what; this second one puts it in order. Receives are waited for in the
order of steps; a segment is reduced when it has arrived and sent on at once; the next receives are posted meanwhile, as
far as nothing that is still in use would be overwritten. Both ends of a link cut a transfer alike and post in the same
order, because all follows from the schedule.

No program waits in a circle, even over a transport that finishes a send only when its receiver waits for it: a rank
waits for a send of step k only after it has dealt with all its receives of steps up to k (for the one exception see
`plan._crosses`), so by induction over k every receive of step k is reached.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from collectives.cutting import Cutting
from collectives.footprint import Footprint, merged
from collectives.instructions import (
    NOWHERE,
    SCRATCH,
    STAGING,
    AwaitReceive,
    AwaitSend,
    BorrowReceive,
    Instruction,
    Lend,
    PostReceive,
    PostSend,
    TakeNote,
    TakePack,
    Where,
)
from collectives.plan import NEVER_USED, START, Plan
from collectives.schedule import Schedule

WAITING = (AwaitReceive, AwaitSend, BorrowReceive, TakeNote, TakePack)
"""Instructions that end only when a peer has done something."""


@dataclass(frozen=True, slots=True)
class Program:
    """What a rank does, in order. Needs `footprint` elements of staging and `scratch` elements of scratch memory."""

    instructions: tuple[Instruction, ...]
    footprint: int
    scratch: int
    result: tuple[Where, ...]
    """Where the wanted ranges are at the end, in order, as few pieces as there are."""
    opening: int
    """So many instructions come before the first that waits for a peer."""

    def pieces(self, source: Tensor, staging: Tensor) -> tuple[Tensor, ...]:
        """The result as views: of staging, and of the caller's tensor where nothing was lifted."""
        return tuple((staging if memory == STAGING else source)[start:stop] for memory, start, stop in self.result)


def compile_program(schedule: Schedule, rank: int, cutting: Cutting) -> Program:
    """Compile what `rank` does in `schedule`.

    Raises:
        UsageError: the schedule reads a range that is nowhere on this rank, or changes one in the step in which it is
            sent (see `collectives.verify`).

    """
    return _Order(Plan(schedule, rank, cutting)).program()


class _Order:
    """The second pass."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._footprint = Footprint(plan.kept())
        self._made: list[Instruction] = []
        self._waited: set[int] = set()
        self._posted = 0
        self._did = NEVER_USED  # the time whose tasks were done last
        self._unfolded = Counter(folding.receive for due in plan.folds.values() for folding in due)
        self._slot_size = max((receive.scratch for receive in plan.receives), default=0)
        self._slot_of: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._slots = 0

    def program(self) -> Program:
        plan = self._plan
        self._post_ahead(START)
        self._do_due(START)
        self._post_ahead(START)
        for index in range(len(plan.receives)):
            if self._posted == index:
                self._post(index)
            self._arrive(index)
            self._post_ahead(index - 1)
            self._do_due(index)
            self._post_ahead(index)
        if plan.cutting.lend:
            self._made = [self._lent(instruction) for instruction in self._made]
        else:
            self._await_sends(frozenset(range(len(plan.send_step))))
        result = tuple(merged(map(self._footprint.place, plan.result)))
        opening = next((i for i, made in enumerate(self._made) if isinstance(made, WAITING)), len(self._made))
        return Program(tuple(self._made), self._footprint.size, self._slots * self._slot_size, result, opening)

    def _lent(self, instruction: Instruction) -> Instruction:
        """A send that nothing waits for, because nothing overwrites its data, is over with the operation."""
        if isinstance(instruction, PostSend) and instruction.number not in self._waited:
            return Lend(instruction.peer, instruction.data)
        return instruction

    def _post_ahead(self, done: int) -> None:
        """Post the next receives within the window, up to the first that may not land yet."""
        plan = self._plan
        while self._posted < min(len(plan.receives), done + 1 + plan.cutting.window):
            receive = plan.receives[self._posted]
            step = plan.receives[done + 1].step
            if receive.scratch and not self._free_slots and self._slots > plan.cutting.window:
                return
            if not receive.inline:
                waits = receive.landing_waits - self._waited
                if any(plan.send_step[send] >= step or plan.send_due[send] > self._did for send in waits):
                    return  # to wait for it now might be to wait for a peer that waits for us
                if receive.landing_after > self._did:
                    return
            self._post(self._posted)

    def _post(self, index: int) -> None:
        """Post a receive; of one that comes as notes, only take its slot."""
        receive = self._plan.receives[index]
        self._posted += 1
        if receive.scratch:
            self._slot_of[index] = self._take_slot()
        if not receive.inline:
            self._await_sends(receive.landing_waits)
            self._add(PostReceive(index, receive.peer, receive.into[0]), index)

    def _arrive(self, index: int) -> None:
        receive = self._plan.receives[index]
        if not receive.inline:
            folded = self._plan.cutting.lend and self._unfolded[index]
            self._add(BorrowReceive(index, receive.into[0]) if folded else AwaitReceive(index), index)
            return
        self._await_sends(receive.landing_waits)
        if len(receive.into) > 1:
            self._add(TakePack(receive.peer, tuple(receive.into)), index)
        else:
            self._add(TakeNote(receive.peer, receive.into[0] if receive.into else NOWHERE), index)

    def _do_due(self, time: int) -> None:
        """Reduce what is to be reduced now, then do the tasks of this time."""
        for index, fold, waits in self._plan.folds.get(time, ()):
            self._await_sends(waits)
            self._add(fold, index)
            self._unfolded[index] -= 1
            if not self._unfolded[index] and index in self._slot_of:
                self._free_slots.append(self._slot_of[index])
        for task in self._plan.due.get(time, ()):
            self._await_sends(task.waits)
            self._add(task.instruction)
        self._did = time

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._slots += 1
        return self._slots - 1

    def _await_sends(self, sends: frozenset[int]) -> None:
        for send in sorted(sends - self._waited):
            self._waited.add(send)
            self._add(AwaitSend(send))

    def _add(self, instruction: Any, receive: int = START) -> None:
        """Append an instruction, its ranges moved to where they are in memory; `receive` is the one it belongs to."""
        slot = self._slot_of.get(receive, 0) * self._slot_size

        def placed(field: Any) -> Any:
            if not isinstance(field, tuple):
                return field
            if not isinstance(field, Where):
                return tuple(map(placed, field))
            if field.memory == SCRATCH:
                return Where(SCRATCH, slot + field.start, slot + field.stop)
            return self._footprint.place(field)

        self._made.append(type(instruction)(*map(placed, instruction)))
