"""Who uses which port when: what the processes of one emulated epoch share, in a small file in memory.

Each process of `emulated` reserves time on the ports that its messages pass. A port's reservations are kept as disjoint
intervals of the monotonic clock, which all processes of a host share, so that a message takes the first gap that it
fits into, no matter which process asked first.
"""

import fcntl
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from collectives.crossing import forget, reserve
from collectives.errors import TransportLost

INTERVALS = 64
"""Disjoint intervals that a port can remember."""
_ROW = 1 + 2 * INTERVALS
_TURN = 50e-6


class Ledger:
    """The reservations of one epoch's ports. For any thread.

    Args:
        name: the same in all processes of the epoch and in no others.
        ports: how many there are.
        aborted: asked while another process holds the ledger.

    """

    def __init__(self, name: str, ports: int, aborted: Callable[[], bool]) -> None:
        folder = Path("/dev/shm")
        self._path = (folder if folder.is_dir() else Path(tempfile.gettempdir())) / f"ringhold-ledger-{name}"
        size = ports * _ROW * 8
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, size)  # zeros, also where another process was first
        self._memory = mmap.mmap(self._file, size)
        self._table = memoryview(self._memory).cast("d")
        self._aborted = aborted
        self._lock = threading.Lock()

    def unlink(self) -> None:
        """Take the name away; to be called once all processes of the epoch have opened it, by any number of them."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "Ledger":
        """Wait for one's turn. TransportLost: aborted meanwhile."""
        self._lock.acquire()
        try:
            while not self._try():
                if self._aborted():
                    raise TransportLost("the transport of this epoch was aborted")
                time.sleep(_TURN)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._lock.release()

    def reserve(self, port: int, head: float, seconds: float, past: float) -> tuple[float, float]:
        """Take the first `seconds` that are free from `head` on, in one's turn; returns when they begin and end.

        Intervals that ended before `past` are dropped.
        """
        at = port * _ROW
        edges = [float(edge) for edge in self._table[at + 1 : at + 1 + 2 * int(self._table[at])]]
        taken = list(zip(edges[::2], edges[1::2], strict=True))
        forget(taken, past)
        span = reserve(taken, head, seconds)
        if len(taken) > INTERVALS:
            taken[-2:] = [(taken[-2][0], taken[-1][1])]  # no room to remember the gap between these
        self._table[at] = len(taken)
        for place, edge in enumerate((edge for interval in taken for edge in interval), at + 1):
            self._table[place] = edge
        return span

    def close(self) -> None:
        """Let go of the memory. Nobody may use the ledger any more."""
        with self._lock:
            self._table.release()
            self._memory.close()
            os.close(self._file)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
