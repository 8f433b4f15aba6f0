"""Lanes: named queues of operations (rule R1). Blocking ones run in the caller's thread, asynchronous ones in another.

The communicator keeps one `Lane` per name. Operations of one lane run one after the other in the order of the calls;
concurrency is several lanes.
"""

import queue
import threading
from collections.abc import Callable

from collectives.errors import LaneMisuse, MemberLost
from collectives.operations import Operation, View
from collectives.outcome import Outcome, Work


class Lane:
    """One lane of a communicator.

    `view` is what its caller sees of the membership (rule R5): it changes when a wait returns, by result or by error.
    """

    def __init__(self, name: str, execute: Callable[[Operation], Outcome], view: Callable[[], View]) -> None:
        self.name = name
        self.view = view()
        self._execute = execute
        self._newest_view = view
        self._lock = threading.Condition()
        self._user: int | None = None
        self._pending = 0
        self._halted: MemberLost | None = None
        self._queue: queue.SimpleQueue[tuple[Operation, _LaneWork] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or queued."""
        return self._pending == 0

    def run(self, operation: Operation) -> Outcome:
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

    def submit(self, operation: Operation) -> Work:
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
        """End the worker once what is queued has ended."""
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join(5.0)
            self._worker = None

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

    def _run(self, operation: Operation) -> Outcome:
        if self._halted is not None:
            raise MemberLost(f"{self._halted} (call resume() first)", self._halted.lost, self._halted.survivors)
        try:
            return self._execute(operation)
        except MemberLost as error:
            if operation.on_loss == "raise":
                self._halted = error
            raise

    def _enqueue(self, operation: Operation) -> Work:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name=f"ringhold-lane-{self.name}", daemon=True)
            self._worker.start()
        work = _LaneWork(self)
        self._queue.put((operation, work))
        return work

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
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
