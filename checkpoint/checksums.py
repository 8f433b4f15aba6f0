"""Proving files by the checksums that they carry, while they are read: each range that was read from, whole.

`torch.save` keeps a CRC-32 of every storage. A conversion asks `Files.prove` for it: a thread of its own follows the
reads, at the cost of a second look at bytes that are in the page cache by then. Used by `checkpoint.files`.
"""

import os
import zlib
from bisect import bisect_left, bisect_right
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from collectives.errors import CorruptFile

_BUFFER = 1 << 20


class Span(NamedTuple):
    """A range of a file with its CRC-32."""

    start: int
    size: int
    crc: int
    name: str


class Spans:
    """The ranges of one file that have a checksum, and which of them were read from."""

    def __init__(self) -> None:
        self._spans: dict[int, Span] = {}
        self._starts: list[int] = []
        self._taken: set[int] = set()

    def add(self, span: Span) -> None:
        """Take a range; ranges do not lie over each other."""
        self._spans[span.start] = span

    def touched(self, start: int, count: int) -> list[Span]:
        """The ranges that a read touches for the first time. Two threads may both be the first."""
        if len(self._starts) != len(self._spans):
            self._starts = sorted(self._spans)
        first = max(0, bisect_right(self._starts, start) - 1)
        last = bisect_left(self._starts, start + count)
        new = [at for at in self._starts[first:last] if at not in self._taken]
        self._taken.update(new)
        return [span for at in new if (span := self._spans[at]).start + span.size > start]


class Prover:
    """A thread that computes checksums of ranges as they are named."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[str, Span] | None] = SimpleQueue()
        self._wrong: str | None = None
        self._thread = Thread(target=self._run, name="checksums", daemon=True)
        self._thread.start()

    def check(self, path: str, span: Span) -> None:
        """Name a range; returns at once."""
        self._queue.put((path, span))

    def finish(self) -> None:
        """Wait for all that were named. `CorruptFile`: one is not what was written."""
        self._queue.put(None)
        self._thread.join()
        if self._wrong is not None:
            raise CorruptFile(self._wrong)

    def _run(self) -> None:
        buffer = bytearray(_BUFFER)
        while (item := self._queue.get()) is not None:
            path, span = item
            if self._wrong is None:
                self._wrong = _prove(path, span, buffer)


def _prove(path: str, span: Span, buffer: bytearray) -> str | None:
    """What is wrong with a range; None if its checksum is right."""
    view, crc, at, stop = memoryview(buffer), 0, span.start, span.start + span.size
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while at < stop:
                got = os.preadv(descriptor, [view[: min(len(buffer), stop - at)]], at)
                if not got:
                    return f"{path} ended while it was read; is another process writing it?"
                crc = zlib.crc32(view[:got], crc)
                at += got
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if crc == span.crc:
        return None
    return f"{path}: {span.name} does not have the checksum that was written with it: bits have changed; copy it again"
