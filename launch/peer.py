"""The main of a peer process, `python -m launch.peer`, started by a supervisor and by nobody else.

It tells the supervisor what happens (`launch.child`), takes its commands (start, die, leave), and runs the job.
"""

import os
import queue
import signal
import sys
import threading
import time
from typing import Any

from collectives import faults
from collectives.errors import RingholdError
from launch.child import Link

Event = dict[str, Any]
_GATE_PATIENCE = 30.0
"""Seconds, less than what makes a stall of an operation: a gate must never be what fails a run."""


class Peer:
    """One peer: the job on one side, the supervisor's commands on the other."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.leaving = threading.Event()
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._pace = 0.0
        self._gates: set[int] = set()
        self._open = 0
        self._gate = threading.Condition()
        self._step_ended = 0.0
        self._victim = ""
        """Kind of the operation in which a planned death strikes; empty: any."""

    def run(self) -> int:
        """Wait for the order to start, train, and return the exit code."""
        from launch.config import JobConfig
        from launch.job import run_peer  # imports torch, which takes seconds: a spare does it ahead of time

        self.link.report("ready")
        order = self._orders.get()
        self._pace, self._gates = order["pace"], set(order["gates"])
        config = JobConfig.from_json(order["config"])
        self._victim = "" if config.plan else "all_reduce"
        try:
            run_peer(config, lambda: self._join(order), self._tell, self.leaving)
        except RingholdError as error:
            self.link.report("error", error=type(error).__name__, message=str(error), exit_code=error.exit_code)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        return 0

    def on_command(self, command: dict[str, Any]) -> None:
        """Carry out a command of the supervisor, in the control thread."""
        match command["do"]:
            case "start":
                self._orders.put(command)
            case "go":
                with self._gate:
                    self._open = command["step"]
                    self._gate.notify_all()
            case "leave":
                self.leaving.set()
            case "die":
                faults.arm(command["point"], self._die, self._victim, command["skip"])

    def _join(self, order: dict[str, Any]) -> Any:
        from collectives.communicator import Communicator

        return Communicator.join(
            coordinator=order["coordinator"],
            run=order["run"],
            transport=order["transport"],
            on_event=lambda event: self.link.report("event", **event),
        )

    def _tell(self, event: Event) -> None:
        """Pass an event of the job on. A step ends here: after its pace, and at a gate when the supervisor says so."""
        fields = dict(event)
        kind = fields.pop("event")
        if kind == "step":
            kind, fields["seconds"] = "progress", fields.pop("time")
            rest = self._step_ended + self._pace - time.monotonic()
            if rest > 0:
                time.sleep(rest)
            self._step_ended = time.monotonic()
        self.link.report(kind, **fields)
        if kind == "progress" and fields["step"] in self._gates:
            with self._gate:
                self._gate.wait_for(lambda: self._open >= fields["step"], _GATE_PATIENCE)

    def _die(self, where: str) -> None:
        """Be killed, here and now, in the middle of an operation. The report is out before the signal is."""
        self.link.report("fired", where=where)
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Run this process's peer."""
    peer = Peer(Link.enter())
    peer.link.listen(peer.on_command)
    return peer.run()


if __name__ == "__main__":
    sys.exit(main())
