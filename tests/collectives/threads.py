"""A group of threads that stands in for communicators: real exchange, and members that die when the test says so.

It keeps the contracts that `sync` relies on: after a loss an all-gather ends with the rows of the survivors, a run of a
schedule with `MemberLost` on all of them. Members that call different operations are a failure of the test.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collectives.errors import MemberLost
from collectives.schedule import Schedule
from collectives.verify import verify

T = TypeVar("T")
Moment = tuple[str, int]
"""A kind of operation ("all_gather" or a schedule's kind) and its number, from 0, among those of its kind."""
Tamper = Callable[[Moment, Schedule, dict[int, npt.NDArray[np.uint8]]], None]
"""Changes what arrived: the buffers of all members by id."""

PATIENCE = 20.0


class Died(Exception):
    """The member's thread ends here."""


@dataclass(frozen=True)
class Rows:
    result: Tensor
    contributors: tuple[int, ...]


@dataclass
class Hub:
    """Where the members meet.

    `deaths` says in which operation a member dies, before it ends. `moved` counts the bytes of exchanges.
    """

    members: Sequence[int]
    deaths: Mapping[int, Moment] = field(default_factory=dict)
    tamper: Tamper | None = None
    log: list[Moment] = field(default_factory=list)
    moved: int = 0

    def __post_init__(self) -> None:
        self.living = list(self.members)
        self._changed = threading.Condition()
        self._arrived: dict[int, tuple[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._lost: list[int] = []
        self._results: dict[int, Any] = {}
        self._turn = 0

    def meet(self, member: int, kind: str, payload: Any) -> Any:
        """Enter an operation; returns when all living members have."""
        with self._changed:
            if self.deaths.get(member) == (kind, self._counts[kind]):
                self.living.remove(member)
                self._lost.append(member)
                self._end_if_complete()
                raise Died(member)
            self._arrived[member] = (kind, payload)
            turn = self._turn
            self._end_if_complete()
            if not self._changed.wait_for(lambda: self._turn > turn, PATIENCE):
                raise TimeoutError(f"member {member} waits in {kind} for {set(self.living) - set(self._arrived)}")
            result = self._results[member]
        if isinstance(result, Exception):
            raise result
        return result

    def _end_if_complete(self) -> None:
        if not self.living or set(self._arrived) != set(self.living):
            return
        kinds = {kind for kind, _ in self._arrived.values()}
        if len(kinds) > 1:
            self._results = dict.fromkeys(self.living, AssertionError(f"members disagree on the operation: {kinds}"))
        else:
            kind = kinds.pop()
            self._results = self._outcomes(kind, {member: self._arrived[member][1] for member in self.living})
            self.log.append((kind, self._counts[kind]))
            self._counts[kind] += 1
        self._arrived = {}
        self._lost = []
        self._turn += 1
        self._changed.notify_all()

    def _outcomes(self, kind: str, payloads: dict[int, Any]) -> dict[int, Any]:
        survivors = tuple(self.living)
        if kind == "all_gather":
            assert len({(tensor.shape, tensor.dtype) for tensor in payloads.values()}) == 1
            rows = torch.stack(list(payloads.values()))
            return {member: Rows(rows.clone(), survivors) for member in survivors}
        world = len(survivors) + len(self._lost)
        assert {schedule.world for schedule, _ in payloads.values()} == {world}
        if self._lost:
            lost = tuple(self._lost)
            return {member: MemberLost(f"lost {lost}", lost, survivors) for member in survivors}
        self._execute((kind, self._counts[kind]), payloads)
        return dict.fromkeys(survivors)

    def _execute(self, moment: Moment, payloads: dict[int, tuple[Schedule, Tensor]]) -> None:
        """Run a schedule, after a proof; what a rank does not want is noise afterwards."""
        schedule = payloads[self.living[0]][0]
        verify(schedule)
        buffers = [payloads[member][1].numpy() for member in self.living]
        work = [np.full(schedule.count, 0xAA, dtype=np.uint8) for _ in self.living]
        for rank, buffer in enumerate(buffers):
            for start, stop in schedule.held(rank):
                work[rank][start:stop] = buffer[start:stop]
        for index in range(len(schedule)):
            step = schedule.step(index)
            before = [buffer.copy() for buffer in work]
            for src, dst, start, stop in zip(step.src, step.dst, step.start, step.stop, strict=True):
                work[dst][start:stop] = before[src][start:stop]
                self.moved += int(stop - start) if schedule.kind == "exchange" else 0
        if self.tamper is not None:
            self.tamper(moment, schedule, dict(zip(self.living, work, strict=True)))
        for rank, buffer in enumerate(buffers):
            buffer[:] = 0xAA
            for start, stop in schedule.wanted(rank):
                buffer[start:stop] = work[rank][start:stop]


@dataclass(frozen=True)
class Member:
    """One member's access to the hub; what `sync` takes for a communicator."""

    hub: Hub
    member_id: int

    def all_gather(self, tensor: Tensor, /) -> Rows:
        rows = self.hub.meet(self.member_id, "all_gather", tensor)
        assert isinstance(rows, Rows)
        return rows

    def run(self, schedule: Schedule, tensor: Tensor, /) -> None:
        assert tensor.shape == (schedule.count,)
        assert tensor.dtype == torch.uint8
        self.hub.meet(self.member_id, schedule.kind, (schedule, tensor))


def on_threads(hub: Hub, work: Callable[[Member], T]) -> dict[int, T | Exception]:
    """Do the work as every member at once; what it returned or raised, by member."""

    def one(member: int) -> T | Exception:
        try:
            return work(Member(hub, member))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(hub.members)) as pool:
        return dict(zip(hub.members, pool.map(one, hub.members), strict=True))
