"""Files of a store: on a local disk, or behind any fsspec URL. The only place of this folder that touches them.

`checkpoint.store` and those who write packs use a `Storage`. Names are relative, with "/" between; a file is written
once from start to end (`create`) or appears whole in one step (`publish`), and is never changed after that.
"""

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from collectives.errors import CorruptFile, NoCheckpoint, StorageFailed

Bytes = npt.NDArray[np.uint8]


def as_memory(data: Bytes | bytes) -> memoryview:
    """The bytes without a copy."""
    return memoryview(data.data if isinstance(data, np.ndarray) else data)


class Sink(Protocol):
    """A file that is being written. Ends by `close` or `abandon`."""

    def write(self, data: Bytes | bytes) -> None:
        """Append. Raises `StorageFailed`."""

    def close(self) -> None:
        """Bring it to the disk: after this it is there, whole, even after a crash. Raises `StorageFailed`."""

    def abandon(self) -> None:
        """Give it up, and remove it where that can be done. Never raises."""


class Storage(Protocol):
    """Where a store is. For any thread. Every method raises `StorageFailed`, `NoCheckpoint` for what is not there."""

    @property
    def url(self) -> str:
        """What the user calls it."""

    def read(self, name: str, limit: int) -> bytes:
        """All of a file. Raises `CorruptFile` if it has more than `limit` bytes."""

    def read_into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` from the bytes at `start`. Raises `CorruptFile` if the file ends before that."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def names(self, folder: str) -> list[str]:
        """Names of the files right in a folder, sorted; none where there is no such folder."""

    def create(self, name: str) -> Sink:
        """Begin a file that must not be there yet."""

    def publish(self, name: str, data: bytes, durable: bool = True) -> None:
        """Let a file appear, or be replaced, in one step: whoever looks sees all of it or none of it.

        `durable`: and it is there after a crash of the machine.
        """

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""

    def close(self) -> None:
        """Free what is kept open."""


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage for a path or URL; nothing is created by it.

    Raises:
        StorageFailed: no such kind of URL, or its library is not installed.

    """
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" in text:
        from checkpoint.remote import Remote

        return Remote(text)
    return Local(Path(text))


def explain(error: BaseException, doing: str) -> StorageFailed:
    """What to tell the user of an error of the system."""
    if isinstance(error, FileNotFoundError):
        return NoCheckpoint(f"cannot {doing}: it is not there; check the path")
    hints = {
        errno.ENOSPC: "free some space and try again",
        errno.EDQUOT: "free some space and try again",
        errno.EACCES: "check who owns it and its permissions",
        errno.EPERM: "check who owns it and its permissions",
        errno.EROFS: "choose a place that can be written",
        errno.ENOTDIR: "a part of the path is a file; choose another path",
        errno.EISDIR: "it is a folder; choose another path",
        errno.EEXIST: "it is there already; choose another path",
    }
    number = getattr(error, "errno", None)
    why = os.strerror(number) if isinstance(number, int) and number in errno.errorcode else str(error) or repr(error)
    return StorageFailed(f"cannot {doing}: {why}; {hints.get(number or 0, 'look at the storage and try again')}")


class Local:
    """A folder on a local disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The path as given."""
        return str(self._root)

    def read(self, name: str, limit: int) -> bytes:
        """All of a file."""
        path = self._root / name
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise explain(error, f"read {path}") from None
        if len(data) > limit:
            raise CorruptFile(f"{path} has more than {limit} bytes, which no such file has")
        return data

    def read_into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out`; the file stays open for the next call."""
        path = self._root / name
        try:
            handle = self._handle(name)
            at = 0
            while at < len(out):
                got = os.preadv(handle, [out[at:].data], start + at)
                if got == 0:
                    raise CorruptFile(f"{path} ends at byte {start + at}, before byte {start + len(out)}")
                at += got
        except OSError as error:
            raise explain(error, f"read {path}") from None

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self._root / name
        try:
            return path.stat().st_size
        except OSError as error:
            raise explain(error, f"look at {path}") from None

    def names(self, folder: str) -> list[str]:
        """Files right in a folder."""
        path = self._root / folder
        try:
            return sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explain(error, f"list {path}") from None

    def create(self, name: str) -> Sink:
        """Begin a file."""
        path = self._root / name
        try:
            _make_folder(path.parent)
            return _LocalSink(path)
        except OSError as error:
            raise explain(error, f"create {path}") from None

    def publish(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write a draft beside it, bring it to the disk, rename it, bring the folder to the disk."""
        path = self._root / name
        draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            _make_folder(path.parent)
            try:
                with draft.open("wb") as file:
                    file.write(data)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                draft.replace(path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            if durable:
                sync_folder(path.parent)
        except OSError as error:
            raise explain(error, f"write {path}") from None

    def remove(self, name: str) -> None:
        """Remove a file."""
        path = self._root / name
        with self._lock:
            if name in self._open:
                os.close(self._open.pop(name))
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, f"remove {path}") from None

    def close(self) -> None:
        """Close what was read."""
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _handle(self, name: str) -> int:
        with self._lock:
            if name not in self._open:
                self._open[name] = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[name]


class _LocalSink:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: Bytes | bytes) -> None:
        view = as_memory(data)
        try:
            while view:
                view = view[os.write(self._handle, view) :]
        except OSError as error:
            raise explain(error, f"write {self._path}") from None

    def close(self) -> None:
        try:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
            sync_folder(self._path.parent)
        except OSError as error:
            raise explain(error, f"write {self._path}") from None

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._handle)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each to be found after a crash."""
    if not path.exists():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
