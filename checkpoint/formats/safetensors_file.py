"""Writing safetensors files, streamed: the header first, then tensor by tensor. For `write_plain` and `write_hf`."""

import json
import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from checkpoint.convert import Journal, Progress
from checkpoint.dtypes import itemsize
from checkpoint.source import Entry, Source, blocks
from collectives.region import Region

_THREADS = 2
_FLUSHED = 64 << 20
"""Bytes after which what was written is flushed and noted, so that an interrupted conversion goes on from there."""

Named = tuple[str, Entry]
"""The key under which a tensor is written, and the entry of the source that it is."""


@dataclass(frozen=True, slots=True)
class _Job:
    key: str
    box: Region
    at: int
    nbytes: int


def write_file(
    path: Path,
    tensors: Sequence[Named],
    source: Source,
    metadata: Mapping[str, str],
    progress: Progress,
    journal: Journal | None = None,
) -> None:
    """Write a file of tensors; what the journal knows of it is not written again.

    The widest dtype comes first, so that every tensor is aligned. Memory: two blocks for each of two threads.

    Raises:
        OSError: the file cannot be written.

    """
    ordered = sorted(tensors, key=lambda named: -itemsize(named[1].dtype))
    header = header_of(ordered, metadata)
    done = journal.done(path.name) if journal else 0
    with path.open("r+b" if done and path.exists() else "w+b") as file:
        descriptor = file.fileno()
        if os.fstat(descriptor).st_size < done or done < len(header):
            done = 0
            os.ftruncate(descriptor, 0)
            _write(descriptor, header, 0)
        noted = done
        with ThreadPoolExecutor(_THREADS) as pool:
            for job in _in_order(pool, source, descriptor, _jobs(ordered, len(header)), done):
                progress(job.nbytes)
                if journal is not None and job.at + job.nbytes >= noted + _FLUSHED:
                    noted = job.at + job.nbytes
                    os.fdatasync(descriptor)
                    journal.record(path.name, noted)


def header_of(tensors: Sequence[Named], metadata: Mapping[str, str]) -> bytes:
    """Return the length and JSON of a header, padded to 8 bytes, of tensors one behind the other."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, entry in tensors:
        offsets = [at, at + entry.nbytes]
        table[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _jobs(tensors: Sequence[Named], at: int) -> Iterator[_Job]:
    for _, entry in tensors:
        for box in blocks(entry):
            nbytes = box.size * itemsize(entry.dtype)
            yield _Job(entry.key, box, at, nbytes)
            at += nbytes


def _in_order(
    pool: ThreadPoolExecutor, source: Source, descriptor: int, jobs: Iterator[_Job], done: int
) -> Iterator[_Job]:
    """Copy blocks at once, a few at a time, and yield each when it and all before it are written."""

    def copy(job: _Job) -> None:
        _write(descriptor, source.read(job.key, job.box).data, job.at)

    waiting: deque[tuple[_Job, Future[None] | None]] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(copy, job) if job.at + job.nbytes > done else None))
        if len(waiting) > _THREADS:
            yield _finished(*waiting.popleft())
    while waiting:
        yield _finished(*waiting.popleft())


def _finished(job: _Job, future: Future[None] | None) -> _Job:
    if future is not None:
        future.result()
    return job


def _write(descriptor: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
