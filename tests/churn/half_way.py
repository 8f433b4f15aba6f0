"""A process that waits for half of a tensor's bytes, whose other half is with a process that it stopped. A test's tool.

`python half_way.py recv|send FOLDER` prints what the wait returned once it was woken.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from collectives.transports.gloo_wake import wake
from launch.child import die_with_parent

COUNT = 32 << 20
"""Floats: more than the kernel's buffers take, so that the rest is still on its way when the other end is stopped."""
_MINUTE = timedelta(seconds=60)


def main(direction: str, folder: Path) -> None:
    """Rank 0 waits, rank 1 is stopped."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with_parent(parent)
        work = getattr(_build(folder, 1), "send" if direction == "recv" else "recv")([torch.zeros(COUNT)], 0, 1)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGSTOP)
        work.wait(_MINUTE)
    group = _build(folder, 0)
    work = getattr(group, direction)([torch.zeros(COUNT)], 1, 1)
    os.waitpid(pid, os.WUNTRACED)
    waiter = threading.Thread(target=lambda: print(work.wait(_MINUTE), flush=True), daemon=True)
    waiter.start()
    time.sleep(0.2)
    wake(work)
    waiter.join(20.0)
    wake(work)
    print(work.wait(_MINUTE), flush=True)
    os.kill(pid, signal.SIGKILL)
    os._exit(0)  # the group would take its time


def _build(folder: Path, rank: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs call it Options
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
    options._timeout = timedelta(seconds=20)
    store = dist.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    return dist.ProcessGroupGloo(store, rank, 2, options)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
