"""Lanes: named queues of operations (rule R1). Blocking ones run in the caller's thread, asynchronous ones in another.

The communicator keeps its `Lanes`, those of its sub-groups and of its messages too. Operations of one lane run one
after the other in the order of the calls; concurrency is several lanes. A thread serves a lane's asynchronous
operations and ends when the lane has been idle for a while: there are as many as lanes with something under way. A pool
of fewer could be full of receives that wait for sends which are queued behind them.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache

from collectives.errors import LaneMisuse, MemberLost, UsageError
from collectives.in_flight import InFlight
from collectives.membership.protocol import MAX_FRAME
from collectives.operations import Call, View
from collectives.outcome import Outcome, Work

IDLE_SECONDS = 1.0
"""A worker ends when there was nothing to do for so long."""
LONGEST_NAME = 48
_SEPARATORS = "@#>"
_ROW_BYTES = 128
"""Upper bound of what a heartbeat says of a lane, but for its name and the members of its sub-group."""


@lru_cache(maxsize=1024)
def check_name(what: str, name: str) -> None:
    """Raise `UsageError` unless a lane or a sub-group may have this name, which members tell each other."""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or any(mark in name for mark in _SEPARATORS):
        marks = " ".join(_SEPARATORS)
        raise UsageError(f"{what} {name!r}: a name has 1 to {LONGEST_NAME} printable characters and none of {marks}")


class Lanes:
    """All lanes of a communicator, by their names in the run.

    Args:
        execute: runs an operation to its end.
        view: newest view of the membership that the last operation of a lane has, given its name and sub-group.

    """

    def __init__(self, execute: Callable[[Call], Outcome], view: Callable[[str, tuple[int, ...]], View]) -> None:
        self._execute, self._view = execute, view
        self._lanes: dict[str, Lane] = {}
        self._in_flight = InFlight()
        self._lock = threading.Lock()
        self._bytes = 0
        self._closed = False

    def __iter__(self) -> Iterator["Lane"]:
        return iter(tuple(self._lanes.values()))

    def lane(self, name: str, group: tuple[int, ...] = ()) -> "Lane":
        """Return the lane of that name; it begins with its first use, among `group` (empty: all members).

        Raises:
            UsageError: there are more lanes than a heartbeat can tell of.

        """
        lane = self._lanes.get(name)
        return self._begin(name, group) if lane is None else lane

    def start(self, lane: "Lane", operation: Call, async_op: bool) -> Outcome | Work:
        """Run the operation on its lane and return its outcome, or queue it and return its work.

        Raises:
            UsageError: the communicator was closed, or the call clashes with one under way; see `InFlight`.

        """
        if self._closed:
            raise UsageError("this communicator was closed; join again")
        operation.lane = lane.name
        if async_op:
            return self._in_flight.queue(operation, lane.submit)
        with self._in_flight.during(operation):
            return lane.run(operation)

    def close(self) -> None:
        """Take no more operations, and end what serves them once what is queued has ended."""
        self._closed = True
        for lane in self:
            lane.close()

    def _begin(self, name: str, group: tuple[int, ...]) -> "Lane":
        with self._lock:
            if name not in self._lanes:
                grown = self._bytes + _ROW_BYTES + len(name) + 9 * len(group)
                if grown > MAX_FRAME // 2:
                    raise UsageError(f"{len(self._lanes)} lanes are too many: use names and tags of lanes again")
                self._lanes[name] = Lane(name, self._execute, lambda: self._view(name, group), group)
                self._bytes = grown
            return self._lanes[name]


class Lane:
    """One lane of a communicator.

    `view` is what its caller sees of the membership (rule R5): it changes when a wait returns, by result or by error.
    """

    def __init__(
        self,
        name: str,
        execute: Callable[[Call], Outcome],
        view: Callable[[], View],
        group: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self.group = group
        self.view = view()
        self._execute = execute
        self._newest_view = view
        self._lock = threading.Condition()
        self._user: int | None = None
        self._pending = 0
        self._halted: MemberLost | None = None
        self._queue: queue.SimpleQueue[tuple[Call, _LaneWork] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or queued."""
        return self._pending == 0

    def run(self, operation: Call) -> Outcome:
        """Run an operation to its end, behind those that are queued.

        Raises:
            LaneMisuse: another thread uses the lane.
            RingholdError: the operation's error.

        """
        if not self._begin():
            work = self._enqueue(operation)
            return work.wait()
        try:
            return self._run(operation)
        finally:
            self._end()
            self.refresh()

    def submit(self, operation: Call) -> Work:
        """Queue an operation and return at once."""
        self._begin()
        return self._enqueue(operation)

    def resume(self) -> None:
        """After an `on_loss="raise"`, let the lane take operations again; what is queued is refused first."""
        with self._lock:
            if self._halted is not None:
                self._lock.wait_for(lambda: self._pending == 0)
                self._halted = None
        self.refresh()

    def refresh(self) -> None:
        """Let the caller see the membership of the lane's last operation."""
        self.view = self._newest_view()

    def close(self) -> None:
        """End the worker once what is queued has ended; the next asynchronous operation would start another."""
        with self._lock:
            worker = self._worker
            if worker is not None:
                self._queue.put(None)
        if worker is not None:
            worker.join(5.0)

    def _begin(self) -> bool:
        """Claim the lane for this thread. True: nothing is before us."""
        me = threading.get_ident()
        with self._lock:
            if self._pending and self._user != me:
                raise LaneMisuse(f"lane {self.name!r} is in use by another thread; give each thread a lane of its own")
            self._user = me
            self._pending += 1
            return self._pending == 1

    def _end(self) -> None:
        with self._lock:
            self._pending -= 1
            self._lock.notify_all()

    def _run(self, operation: Call) -> Outcome:
        if self._halted is not None:
            raise MemberLost(f"{self._halted} (call resume() first)", self._halted.lost, self._halted.survivors)
        try:
            return self._execute(operation)
        except MemberLost as error:
            if operation.on_loss == "raise":
                self._halted = error
            raise

    def _enqueue(self, operation: Call) -> Work:
        work = _LaneWork(self)
        with self._lock:
            self._queue.put((operation, work))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"ringhold-lane-{self.name}", daemon=True)
                self._worker.start()
        return work

    def _next(self) -> "tuple[Call, _LaneWork] | None":
        """Return what is next in the queue; None: the lane was closed or idle for a while, and the worker must end."""
        try:
            item = self._queue.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            item = None
        if item is None:
            with self._lock:
                while item is None and not self._queue.empty():
                    item = self._queue.get()
                if item is None:
                    self._worker = None
        return item

    def _work(self) -> None:
        while (item := self._next()) is not None:
            operation, work = item
            outcome: Outcome | None = None
            error: BaseException | None = None
            try:
                outcome = self._run(operation)
            except BaseException as failure:  # whatever it is, whoever waits must not wait for ever
                error = failure
            self._end()
            work.settle(outcome, error)
            del item, operation, work, outcome, error


class _LaneWork(Work):
    """Work whose wait lets the caller of its lane see the membership."""

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self._lane = lane

    def wait(self, timeout: float | None = None) -> Outcome:
        """See `Work.wait`."""
        try:
            return super().wait(timeout)
        finally:
            if self.is_completed():
                self._lane.refresh()
