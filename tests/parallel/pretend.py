"""Ranks as threads of one process, with just enough of a communicator to run reshards: for many cases in little time.

Schedules are run step by step on all buffers at once, as their semantics are written down; nothing is sent.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.outcome import Outcome
from collectives.reduction import ReduceOp, function
from collectives.schedule import Schedule

Result = TypeVar("Result")
PATIENCE = 60.0


class _Table:
    """Where the threads meet."""

    def __init__(self, size: int) -> None:
        self.size, self.elements, self.nbytes = size, 0, 0
        self._given: list[Any] = [None] * size
        self._results: list[Tensor] = []
        self._barrier = threading.Barrier(size, timeout=PATIENCE)

    def exchange(self, rank: int, schedule: Schedule, tensor: Tensor, op: str) -> Tensor:
        self._given[rank] = (schedule, tensor, op)
        if self._barrier.wait() == 0:
            assert {(one.world, one.count, len(one), o) for one, _, o in self._given} == {
                (self.size, schedule.count, len(schedule), op)
            }
            self._results = self._run(schedule, [tensor for _, tensor, _ in self._given], op)
        self._barrier.wait()
        result = self._results[rank]
        self._barrier.wait()
        return result

    def _run(self, schedule: Schedule, sources: list[Tensor], op: str) -> list[Tensor]:
        combine = function(ReduceOp(op))
        buffers = [torch.empty(schedule.count, dtype=source.dtype) for source in sources]
        for rank, source in enumerate(sources):
            ranges = schedule.held(rank)
            for (start, stop), part in zip(ranges, torch.split(source, [b - a for a, b in ranges]), strict=True):
                buffers[rank][start:stop] = part
        for index in range(len(schedule)):
            step, before = schedule.step(index), [buffer.clone() for buffer in buffers]
            columns = (step.src, step.dst, step.start, step.stop, step.combine)
            for src, dst, start, stop, combining in zip(*(column.tolist() for column in columns), strict=True):
                target, data = buffers[dst][start:stop], before[src][start:stop]
                if combining:
                    combine(target, data, target)
                else:
                    target.copy_(data)
                self.nbytes += data.nbytes
        return [
            torch.cat([*(buffer[start:stop] for start, stop in schedule.wanted(rank)), buffer[:0]])
            for rank, buffer in enumerate(buffers)
        ]


@dataclass
class _Seat:
    """What a thread has of a communicator."""

    rank: int
    table: _Table

    @property
    def size(self) -> int:
        return self.table.size

    def redistribute(self, schedule: Schedule, tensor: Tensor, *, op: str = "sum") -> Outcome:
        result = self.table.exchange(self.rank, schedule, tensor, op)
        return Outcome(result, tuple(range(1, self.size + 1)), 1, 1, False)


def together(size: int, program: Callable[[Communicator], Result]) -> tuple[list[Result], int]:
    """Run a program on so many ranks; what each returned, and the bytes that moved."""
    table = _Table(size)

    def run(rank: int) -> Result:
        try:
            return program(cast(Communicator, _Seat(rank, table)))
        except BaseException:
            table._barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size))), table.nbytes
