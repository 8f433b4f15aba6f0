"""The child's half of supervision: die with the parent, hear commands on stdin, report JSON lines on a pipe.

Called first thing in the main of a peer and of a coordinator that a supervisor (`launch.process`) started. It imports
nothing heavy, so that the child is protected within milliseconds of its start.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

REPORT_FD = "RINGHOLD_REPORT_FD"
PARENT_PID = "RINGHOLD_SUPERVISOR_PID"
ORPHANED = 75
"""Exit code of a child whose supervisor is gone (EX_TEMPFAIL)."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; end now if `parent` is gone already.

    Linux only (prctl); elsewhere the end of the control pipe does it, which a stopped process cannot notice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before prctl was in force; then this process already has another parent.
    if os.getppid() != parent:
        os._exit(ORPHANED)


class Link:
    """The pipes between this process and its supervisor. `report` may be called from any thread."""

    def __init__(self, report_fd: int) -> None:
        self._fd = report_fd
        self._lock = threading.Lock()

    @classmethod
    def enter(cls) -> "Link":
        """Tie this process to the supervisor that started it.

        Removes the supervisor's variables from the environment and keeps the pipes from being inherited further.
        """
        die_with_parent(int(os.environ.pop(PARENT_PID)))
        report_fd = int(os.environ.pop(REPORT_FD))
        fcntl.fcntl(report_fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return cls(report_fd)

    def report(self, kind: str, **fields: Any) -> None:
        """Send one message to the supervisor; `time` (seconds since the epoch, UTC) is added unless given.

        One write call a message: a SIGKILL right after this returns loses nothing.
        """
        line = json.dumps({"type": kind, "time": time.time(), **fields}).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]

    def listen(self, on_command: Callable[[dict[str, Any]], None]) -> threading.Thread:
        """Start the thread that hands each command of the supervisor to `on_command`; the supervisor's end ends us."""
        thread = threading.Thread(target=self._listen, args=(on_command,), name="control", daemon=True)
        thread.start()
        return thread

    def _listen(self, on_command: Callable[[dict[str, Any]], None]) -> None:
        # Not through sys.stdin: a thread that holds its lock at the end of the interpreter aborts the process.
        rest = b""
        while piece := os.read(0, 65536):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                on_command(json.loads(line))
        os._exit(ORPHANED)
