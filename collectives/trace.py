"""A trace of what a member does, for chrome://tracing and https://ui.perfetto.dev (option `trace`, RINGHOLD_TRACE).

One file a member, in the JSON array of the Trace Event Format: the member is the process, a lane is a thread, an
operation is a span with its phases (agree, move, confirm, copy out; recover after a loss) and the hops inside them,
with arrows from sender to receiver; epochs, fences and injected faults are instants. `ringhold trace merge` joins the
files.

`Group` calls `operation`, `attempt`, `kernels` and `end`; without the option it holds no `Trace`, and nothing is
measured. What an operation did is written when it ends, in one write, so that a killed member leaves all but its last
one.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from collectives import faults
from collectives.errors import UsageError
from collectives.instructions import Kernel
from collectives.operations import Operation, View
from collectives.transports.base import Transport
from collectives.transports.traced import TracedTransport, now

_PHASES = {"begin": "agree", "end": "move", "confirmed": "confirm", "copied": "copy out"}
"""The fault point that ends each phase."""
_UNSEEN = nullcontext()
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Trace:
    """Writes the trace of one member of one run. For any thread.

    Args:
        folder: where the file `RUN-MEMBER.json` goes; made if it is not there.

    Raises:
        UsageError: the file cannot be written.

    """

    def __init__(self, folder: str, run: str, member: int) -> None:
        self.member = member
        self._lock = threading.Lock()
        self._lanes: dict[str, int] = {}
        self._open: dict[str, Passage] = {}
        path = Path(folder) / f"{run}-{member}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write the trace {path}: {error.strerror}; set RINGHOLD_TRACE anew") from None
        clocks = {"run": run, "monotonic_us": now(), "wall_us": time.time_ns() / 1e3, "boot": _boot()}
        os.write(self._file, b"[\n")
        self._write([self._meta("process_name", {"name": f"member {member} of {run}"}), self._meta("clock", clocks)])
        faults.observers.append(self._fault)

    def close(self) -> None:
        """End the file. A second call does nothing."""
        with self._lock:
            if self._file >= 0:
                os.write(self._file, b"{}]\n")
                os.close(self._file)
                self._file = -1
                faults.observers.remove(self._fault)

    def operation(self, operation: Operation, seq: int, probe: Callable[[str], None] | None) -> Callable[[str], None]:
        """Begin the span of an operation; returns what to call at its points, which calls `probe` in turn."""
        thread = self._thread(operation.lane)
        tensor = operation.tensor
        about = {
            "seq": seq,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "op": operation.op,
            "algorithm": operation.algorithm,
        }
        passage = self._open[operation.lane] = Passage(self.member, thread, operation.kind, about)

        def passing(point: str) -> None:
            passage.passes(point)
            if probe is not None:
                probe(point)

        return passing

    def attempt(self, lane: str, seq: int, view: View, transport: Transport) -> Transport:
        """Begin an attempt; returns the transport to use, which notes every hop."""
        passage = self._open[lane]
        passage.attempts(view.epoch)
        return TracedTransport(transport, passage, f"{view.epoch} {lane} {seq}", view.members)

    def kernels(self, lane: str, kernels: Mapping[str, Kernel]) -> Mapping[str, Kernel]:
        """Return the kernels of the operation under way on this lane, each run of which is noted."""
        passage = self._open[lane]

        def noted(name: str, kernel: Kernel) -> Kernel:
            def run(*views: Tensor) -> None:
                begun = now()
                kernel(*views)
                passage.span(name, begun, {"kernel": True})

            return run

        return {name: noted(name, kernel) for name, kernel in kernels.items()}

    def end(self, lane: str) -> None:
        """End the span of the operation under way on this lane, however it ended."""
        passage = self._open.pop(lane, None)
        if passage is not None:
            self._write(passage.finish())

    def event(self, event: dict[str, Any]) -> None:
        """Note what a communicator tells of its membership; see `Communicator.on_event`."""
        about = {name: value for name, value in event.items() if name not in ("event", "time")}
        words = f"{event['event']} {event['epoch']}" if "epoch" in event else event["event"]
        self._write([self._instant(words, about)])

    def _fault(self, where: str) -> None:
        """A fault point fires: this process may not live on, so all that is known is written now."""
        events = [self._instant(f"fault: {where}", {})]
        for passage in list(self._open.values()):
            events += passage.finish()
        self._write(events)

    def _instant(self, name: str, about: dict[str, Any]) -> dict[str, Any]:
        return {"ph": "i", "s": "p", "name": name, "ts": now(), "pid": self.member, "tid": 0, "args": about}

    def _meta(self, name: str, about: dict[str, Any], thread: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": name, "pid": self.member, "tid": thread, "args": about}

    def _thread(self, lane: str) -> int:
        """Return the number of a lane, from 1; 0 is for what belongs to none."""
        with self._lock:
            new = lane not in self._lanes
            number = self._lanes.setdefault(lane, len(self._lanes) + 1)
        if new:
            self._write([self._meta("thread_name", {"name": f"lane {lane}"}, number)])
        return number

    def _write(self, events: Sequence[dict[str, Any]]) -> None:
        data = "".join(f"{json.dumps(event)},\n" for event in events).encode()
        with self._lock:
            if self._file >= 0:
                os.write(self._file, data)


class Passage:
    """What is known of an operation under way. Used by the one thread that runs it."""

    def __init__(self, member: int, thread: int, kind: str, about: dict[str, Any]) -> None:
        self._where = {"pid": member, "tid": thread}
        self._kind, self._about = kind, about
        self._attempts = 0
        self._begun = self._last = now()
        self._events: list[dict[str, Any]] = []

    def attempts(self, epoch: int) -> None:
        """An attempt begins."""
        self._attempts += 1
        if self._attempts > 1:
            self._phase("recover", {"epoch": epoch})
        self._about |= {"epoch": epoch, "attempts": self._attempts}

    def passes(self, point: str) -> None:
        """The operation passes a fault point."""
        if point in _PHASES:
            self._phase(_PHASES[point], {})

    def span(self, name: str, begun: float, about: dict[str, Any]) -> None:
        """Something inside a phase took from `begun` till now."""
        self._events.append({"ph": "X", "name": name, "ts": begun, "dur": now() - begun, **self._where, "args": about})

    def arrow(self, flow: str, leaves: bool) -> None:
        """A hop leaves here now, or arrives."""
        end = {"ph": "s"} if leaves else {"ph": "f", "bp": "e"}
        self._events.append({**end, "name": "hop", "cat": "hop", "id": flow, "ts": now(), **self._where})

    def finish(self) -> list[dict[str, Any]]:
        """Return the events so far, with the span around them; what comes later is another span."""
        span = {"ph": "X", "name": self._kind, "ts": self._begun, "dur": now() - self._begun, **self._where}
        events = [{**span, "args": dict(self._about)}, *self._events]
        self._events, self._begun = [], now()
        self._last = self._begun
        return events

    def _phase(self, name: str, about: dict[str, Any]) -> None:
        self.span(name, self._last, about)
        self._last = now()


def profiled(kind: str) -> AbstractContextManager[object]:
    """Return a context in which torch.profiler sees an operation; without a profiler it is one that does nothing."""
    active: bool = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(f"ringhold::{kind}") if active else _UNSEEN


def _boot() -> str:
    """Name the host and its boot: traces of one can be compared by the monotonic clock."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""
