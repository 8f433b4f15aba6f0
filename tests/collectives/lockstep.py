"""Runs a schedule on numpy arrays, all ranks in one process, step by step: the reference for engines and algorithms."""

from typing import Any

import numpy.typing as npt

from collectives.schedule import Schedule

Buffers = npt.NDArray[Any]
"""Shape (world, count)."""


def finished(values: Buffers) -> Buffers:
    """Stands for the kernel "finish"; doing it twice, or not at all, shows."""
    return values * 3 + 1


def lockstep(schedule: Schedule, buffers: Buffers) -> Buffers:
    """Run the schedule step by step on all ranks; returns new buffers."""
    after = buffers.copy()
    for index in range(len(schedule)):
        before, step = after.copy(), schedule.step(index)
        columns = (step.src, step.dst, step.start, step.stop, step.combine)
        for src, dst, start, stop, combine in zip(*(values.tolist() for values in columns), strict=True):
            data = before[src, start:stop]
            after[dst, start:stop] = after[dst, start:stop] + data if combine else data
        work = step.computes
        for rank, start, stop in zip(work.rank.tolist(), work.start.tolist(), work.stop.tolist(), strict=True):
            after[rank, start:stop] = finished(before[rank, start:stop])
    return after
