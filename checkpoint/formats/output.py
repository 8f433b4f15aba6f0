"""Torch files of a conversion that has many of them: several at once, and not again when it goes on after a break.

Used by the writers of DCP, DeepSpeed and Megatron folders. A file counts as finished when it is flushed; that is done
now and then, not for each, since flushing is slow.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from checkpoint import torch_file
from checkpoint.convert import Journal, Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

_BATCH = 256 << 20
"""Bytes that are written between two times that files are flushed: what a break costs at most."""


class Output:
    """The folder that a conversion writes into, and its journal. Thread-safe."""

    def __init__(self, folder: Path, journal: Journal | None, progress: Progress) -> None:
        self._folder = folder
        self._journal = journal
        self._progress = progress
        self._lock = threading.Lock()
        self._fresh: dict[str, int] = {}

    def write(self, name: str, values: Sequence[Any], archive: str = "archive") -> list[int]:
        """Write values as torch files, one behind the other into one file, unless it is finished; return their lengths.

        `name` is the file's path within the folder, `archive` what torch calls the values inside.
        """
        finished = 0 if self._journal is None else self._journal.done(name)
        if finished:
            lengths = [torch_file.length(value, archive) for value in values]
            if sum(lengths) == finished:
                self._progress(finished)
                return lengths
        out = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            lengths = [torch_file.write(out, value, archive) for value in values]
        finally:
            os.close(out)
        if self._journal is not None:
            self._record(name, sum(lengths))
        return lengths

    def _record(self, name: str, length: int) -> None:
        """Remember a file that is written; flush what has gathered and tell the journal when it is much."""
        with self._lock:
            self._fresh[name] = length
            if sum(self._fresh.values()) < _BATCH:
                return
            batch, self._fresh = self._fresh, {}
        for one in batch:
            descriptor = os.open(self._folder / one, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        with self._lock:
            assert self._journal is not None
            self._journal.record_all(batch)


def at_once(action: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Do something with every item, in a few threads; results come in the order of the items.

    After an exception, what has not begun is not done.
    """
    pool = ThreadPoolExecutor((os.cpu_count() or 1) + 1)
    try:
        yield from pool.map(action, items)
    finally:
        pool.shutdown(cancel_futures=True)
