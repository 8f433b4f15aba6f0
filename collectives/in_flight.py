"""Which memory of the caller the calls under way read and write, so that a call that would clash is refused.

`lanes.Lanes` keeps one for a communicator. Two calls may read the same memory; what one writes no other may touch, on
whatever lane: whether it would see the memory before or after is a matter of timing, on each member another.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from collectives.errors import UsageError
from collectives.operations import Call
from collectives.outcome import Work

_HARD: Any = 100_000
"""Effort to be spent on finding whether interleaved strides touch; beyond it they are taken to."""


class _Span(NamedTuple):
    """The memory of a tensor: first byte, one past the last, and how the elements lie in between."""

    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """For numpy, which compares memory and never looks into it."""
        strides = tuple(stride * self.item for stride in self.strides)
        kind = f"|V{self.item}"
        return {"version": 3, "data": (self.start, True), "shape": self.shape, "strides": strides, "typestr": kind}

    def touches(self, other: "_Span") -> bool:
        """Whether an element of one shares memory with an element of the other."""
        if self.start >= other.stop or other.start >= self.stop:
            return False
        try:
            return np.shares_memory(np.asarray(self), np.asarray(other), max_work=_HARD)
        except np.exceptions.TooHardError:
            return True


class _Entry:
    """A call under way; `work` is what its lane keeps until the call is over."""

    __slots__ = ("_call", "_spans", "work")

    def __init__(self, call: Call) -> None:
        self._call: Call | None = call
        self._spans: tuple[list[_Span], list[_Span]] | None = None
        self.work: weakref.ref[Work] | None = None

    def spans(self) -> tuple[list[_Span], list[_Span]]:
        """What it reads and what it writes; found when first asked for, which most calls never are."""
        if self._spans is None:
            assert self._call is not None
            self._spans = _spans(self._call.reads), _spans(self._call.writes)
        return self._spans

    def queued(self, work: Work) -> None:
        """Keep nothing of the caller's alive until the call is over."""
        self.spans()
        self.work, self._call = weakref.ref(work), None

    def over(self) -> bool:
        """Whether it has ended."""
        if self.work is None:
            return False
        work = self.work()
        return work is None or work.is_completed()

    def clashes(self, other: "_Entry") -> bool:
        """Whether one writes what the other reads or writes."""
        (reads, writes), (their_reads, their_writes) = self.spans(), other.spans()
        return _meet(writes, their_writes) or _meet(writes, their_reads) or _meet(reads, their_writes)


class InFlight:
    """The calls under way. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Take note of a call for the length of a with statement.

        Raises:
            UsageError: it would read what another one writes, or write what another one reads or writes.

        """
        entry = self._enter(call)
        try:
            yield
        finally:
            self._leave(entry)

    def queue(self, call: Call, submit: Callable[[Call], Work]) -> Work:
        """Take note of a call until its work, which `submit` returns, is complete. Errors as with `during`."""
        entry = self._enter(call)
        try:
            work = submit(call)
        except BaseException:
            self._leave(entry)
            raise
        entry.queued(work)
        return work

    def _enter(self, call: Call) -> _Entry:
        entry = _Entry(call)
        with self._lock:
            if self._entries:
                self._entries = [other for other in self._entries if not other.over()]
                if any(entry.clashes(other) for other in self._entries):
                    raise UsageError(
                        f"{call.kind} on lane {call.lane!r}: another call is under way on the same memory, and one of "
                        "them writes it; wait for that first, or give a copy"
                    )
            self._entries.append(entry)
        return entry

    def _leave(self, entry: _Entry) -> None:
        with self._lock:
            self._entries = [other for other in self._entries if other is not entry]


def _spans(tensors: Sequence[Tensor]) -> list[_Span]:
    return [_span(tensor) for tensor in tensors if tensor.numel()]


def _span(tensor: Tensor) -> _Span:
    shape, strides, item = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    start = tensor.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return _Span(start, start + extent * item, shape, strides, item)


def _meet(some: list[_Span], others: list[_Span]) -> bool:
    return any(one.touches(other) for one in some for other in others)
