"""The process that test processes are forked from: it has imported torch and the package, and has no threads.

`cluster.Zygote` starts one (`python -m tests.harness.zygote FD`) and talks to it over a socket: a request names a
function and comes with the descriptor of the new process' own line to the test; answers tell of its start and its end.
When the test process is gone, so are all that were forked here.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_MOST_BYTES = 1 << 17


def main(descriptor: int) -> NoReturn:
    """Serve requests until the other end closes."""
    import torch  # noqa: F401 - what children shall find imported

    import tests.harness.peer  # noqa: F401

    control = socket.socket(fileno=descriptor)
    wake, waker = socket.socketpair()
    for end in (wake, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test's; it closes the line
    children: dict[int, int] = {}
    """The number of each child by process id; ids are used again, numbers are not."""
    number = 0
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                while wake.recv(4096):
                    pass
            _reap(control, children)
        if control in ready:
            data, descriptors, _, _ = socket.recv_fds(control, _MOST_BYTES, 1)
            if not data:
                for pid in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os._exit(0)
            line = socket.socket(fileno=descriptors[0])
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for end in (control, wake, waker):
                    end.close()
                _become(json.loads(data), line, parent)
            line.close()
            number += 1
            children[pid] = number
            handle = os.pidfd_open(pid)
            socket.send_fds(control, [json.dumps({"started": number, "pid": pid}).encode()], [handle])
            os.close(handle)


def _reap(control: socket.socket, children: dict[int, int]) -> None:
    """Tell of every child that ended: its exit code, or the signal as a negative number."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        word = {"ended": children.pop(pid), "status": os.waitstatus_to_exitcode(status)}
        with contextlib.suppress(BrokenPipeError):
            control.send(json.dumps(word).encode())


def _become(request: dict[str, Any], line: socket.socket, parent: int) -> NoReturn:
    """Be the new process."""
    import torch

    from tests.harness.peer import serve

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    torch.set_num_threads(1)
    serve(request["program"], request["name"], request["setting"], request["given"], line)


if __name__ == "__main__":
    main(int(sys.argv[1]))
