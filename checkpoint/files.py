"""Reading ranges of files: what every reader of checkpoints ends in.

Ranges are read with `pread` into the caller's memory and never mapped: mapped pages would count as memory of the
process, and a file that shrinks under a map ends it.
"""

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from checkpoint.checksums import Prover, Spans
from collectives.errors import CorruptFile

KEPT_OPEN = 256
"""Files of one `Files` that stay open; those beyond are opened for each read."""


class Unreadable(CorruptFile):
    """A file or folder of a checkpoint is not there, or may not be read."""


class Files:
    """The files of one checkpoint, opened when they are first read."""

    def __init__(self) -> None:
        self._files: dict[Path, File] = {}
        self._prover: Prover | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, path: Path) -> "File":
        """Open a file. `Unreadable`: it cannot be opened."""
        if path not in self._files:
            self._files[path] = File(path, keep=len(self._files) < KEPT_OPEN)
            self._files[path].prover = self._prover
        return self._files[path]

    def prove(self, all_of_it: bool = False) -> None:
        """From now on check what is read against the checksums that files carry, on a thread; `proven` ends it.

        `all_of_it`: also what is not read, or was read by an earlier process.
        """
        self._prover = Prover()
        for file in self._files.values():
            file.prover = self._prover
            for span in file.spans.touched(0, file.size) if all_of_it else ():
                self._prover.check(str(file.path), span)

    def proven(self) -> None:
        """Wait for the checks. `CorruptFile`: bits of something that was read have changed."""
        prover, self._prover = self._prover, None
        for file in self._files.values():
            file.prover = None
        if prover is not None:
            prover.finish()

    def close(self) -> None:
        """Close all."""
        if self._prover is not None:
            with contextlib.suppress(CorruptFile):
                self.proven()
        for file in self._files.values():
            file.close()
        self._files.clear()


class File:
    """One file, read at any place by any thread.

    Raises:
        Unreadable: it is not there, is no file, or may not be read.

    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        self.path = path
        self.spans = Spans()
        self.prover: Prover | None = None
        descriptor = self._open()
        try:
            self.size = os.fstat(descriptor).st_size
        finally:
            if not keep:
                os.close(descriptor)
        self._descriptor = descriptor if keep else None

    def _open(self) -> int:
        if self.path.is_dir():
            raise Unreadable(f"{self.path} is a folder where a file is expected; is the checkpoint whole?")
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unreadable(f"{self.path} cannot be read: {error.strerror}; is the checkpoint whole?") from None

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes from `offset`. `CorruptFile`: the file ends before."""
        self._check(offset, count)
        data = bytearray(count)
        self.read_into(offset, data)
        return bytes(data)

    def read_into(self, offset: int, out: Any) -> None:
        """Fill a buffer of contiguous bytes from `offset` on. `CorruptFile`: the file ends before."""
        view = memoryview(out).cast("B")
        self._check(offset, len(view))
        if self.prover is not None:
            for span in self.spans.touched(offset, len(view)):
                self.prover.check(str(self.path), span)
        descriptor = self._open() if self._descriptor is None else self._descriptor
        try:
            at = 0
            while at < len(view):
                got = os.preadv(descriptor, [view[at:]], offset + at)
                if not got:
                    raise CorruptFile(f"{self.path} ended while it was read; is another process writing it?")
                at += got
        except OSError as error:
            raise Unreadable(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from None
        finally:
            if self._descriptor is None:
                os.close(descriptor)

    def _check(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CorruptFile(
                f"{self.path} has {self.size} bytes and should have {offset + count} or more: it is truncated, or not "
                f"what its checkpoint says; copy it again"
            )

    def close(self) -> None:
        """Close it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Memory(File):
    """Bytes that are read like a file: an item of `path` that was unpacked."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.size, self._data = path, len(data), data
        self.spans = Spans()

    def read_into(self, offset: int, out: Any) -> None:
        """Fill a buffer from `offset` on. `CorruptFile`: the bytes end before."""
        view = memoryview(out).cast("B")
        self._check(offset, len(view))
        view[:] = self._data[offset : offset + len(view)]

    def close(self) -> None:
        """Nothing is open."""
