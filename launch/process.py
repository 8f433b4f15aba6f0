"""Child processes with a control pipe, a report pipe and a log: the one place that starts, signals and ends them.

Used by `launch.supervisor`. Everything that a child says, and its end, arrives in one queue (`Inbox`), read by one
thread. Only processes started here are ever signalled, through their own Popen.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.child import PARENT_PID, REPORT_FD
from launch.environment import launcher_descriptors

Message = tuple[str, dict[str, Any]]
"""(name of the child, message); the supervisor's own messages have the name ""."""
Inbox = queue.SimpleQueue[Message]

_LONGEST_LINE = 1 << 20


class Child:
    """One process that we started. Its messages go to the inbox; the last is {"type": "exit", "code": ...}.

    Start children from a thread that lives as long as they shall: the kernel's parent-death signal follows the
    thread that forked, not the process.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        log: Path,
        inbox: Inbox,
    ) -> None:
        self.name = name
        self.log = log
        self.stopped = False
        read_end, write_end = os.pipe()
        try:
            with log.open("ab") as output:
                self.popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**environ, REPORT_FD: str(write_end), PARENT_PID: str(os.getpid())},
                    pass_fds=(write_end, *launcher_descriptors(environ)),
                    # Its own session: Ctrl-C at the terminal reaches the supervisor alone, which ends the rest.
                    start_new_session=True,
                )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._reader = threading.Thread(target=self._read, args=(read_end, inbox), name=f"read {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet (a stopped one has not)."""
        return self.popen.poll() is None

    def send(self, command: Mapping[str, Any]) -> bool:
        """Send one command down the control pipe; False if the child no longer listens."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(command).encode() + b"\n")
            self.popen.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended (its pid is never reused before we reap it)."""
        self.popen.send_signal(number)
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.stopped = number == signal.SIGSTOP

    def tail(self, lines: int = 15) -> str:
        """Return the last lines of the child's log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """After the end of the process: give back the pipe and the thread."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self._reader.join()

    def _read(self, read_end: int, inbox: Inbox) -> None:
        with os.fdopen(read_end, "rb") as file:
            while line := file.readline(_LONGEST_LINE):
                inbox.put((self.name, _parse(line)))
        # The pipe is closed by the process's end, or by a process that misbehaves: either way its end is what counts.
        inbox.put((self.name, {"type": "exit", "code": self.popen.wait(), "time": time.time()}))


def end_all(children: Iterable[Child], grace: float = 3.0) -> None:
    """End every child that still runs: TERM and CONT, up to `grace` seconds together, then KILL; and reap them all."""
    children = list(children)
    for child in children:
        if child.alive:
            child.signal(signal.SIGTERM)
            child.signal(signal.SIGCONT)  # a stopped process takes no TERM
    end = time.monotonic() + grace
    for child in children:
        try:
            child.popen.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.signal(signal.SIGKILL)
    for child in children:
        child.popen.wait()
        child.close()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        body = json.loads(line)
    except ValueError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("type"), str):
        return body
    return {"type": "malformed", "text": line[:200].decode(errors="replace")}
