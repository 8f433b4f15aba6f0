"""Who is at work on a store: a small file for each writer of a running save, and for a running gc.

`checkpoint.saving` and `checkpoint.gc` keep out of each other's way by them, without locks: each writes its own file
first and looks for the other's afterwards, so that at least one of two sees the other. A save that sees a gc shares no
chunks with earlier steps; a gc that sees a save keeps its packs and the step it shares chunks with.

A file is honoured while its process lives, where that can be seen (same host, same boot, same pid namespace), else
until it is `AWAY_SECONDS` old. So what a crash leaves behind is not in the way for long.
"""

import os
import socket
import time
from functools import lru_cache
from pathlib import Path
from typing import Self

import msgspec

from checkpoint.storage import Storage
from collectives.errors import NoCheckpoint, StorageFailed

FOLDER = "saves"
AWAY_SECONDS = 24 * 3600.0
"""How long the file of a process that cannot be seen from here counts."""
_LIMIT = 1 << 16


class Lease(msgspec.Struct, frozen=True):
    """One writer at work."""

    kind: str
    """"save" or "gc"."""
    save: str
    """Names the save; its packs' names begin with it."""
    base: tuple[int, ...]
    """Steps whose chunks it shares."""
    host: str
    space: str
    """Boot and pid namespace: within one, pids can be compared."""
    pid: int
    born: str
    """When the process started, in ticks since boot."""
    since: float
    """Seconds since 1970."""

    @classmethod
    def mine(cls, kind: str, save: str, base: tuple[int, ...] = ()) -> Self:
        """One for this process."""
        pid = os.getpid()
        return cls(kind, save, base, socket.gethostname(), _space(), pid, _born(pid), time.time())

    @property
    def alive(self) -> bool:
        """Whether it counts."""
        if (self.host, self.space) == (socket.gethostname(), _space()):
            return _born(self.pid) == self.born
        return time.time() < self.since + AWAY_SECONDS


class Held:
    """A lease of this process, from `take` to `release`; a context manager."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove it. Where that fails it ends with the process."""
        try:
            self._storage.remove(self._name)
        except StorageFailed:
            return


def take(storage: Storage, lease: Lease, part: str) -> Held:
    """Write a lease; `part` tells the writers of one save apart."""
    name = f"{FOLDER}/{lease.save}-{part}.json"
    storage.publish(name, msgspec.json.encode(lease), durable=False)
    return Held(storage, name)


def read_all(storage: Storage) -> dict[str, Lease]:
    """All leases by file name, dead ones too; a file that says nothing (half written by a dead disk) is left out."""
    found: dict[str, Lease] = {}
    for name in storage.names(FOLDER):
        try:
            found[name] = msgspec.json.decode(storage.read(f"{FOLDER}/{name}", _LIMIT), type=Lease)
        except (msgspec.MsgspecError, UnicodeDecodeError, NoCheckpoint):
            continue
    return found


def _born(pid: int) -> str:
    """When a process started; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if not _exists(pid) else "?"
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@lru_cache(1)
def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "unknown"
