"""Every algorithm as compiled programs, over a transport on which each wait in the wrong place is a deadlock."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from collectives.schedule import Schedule
from collectives.verify import REDUCING
from tests.collectives.schedules import PLAIN, VARIED
from tests.collectives.test_program import execute

COUNT = 5000
SEGMENT = 1024
RUNS = {name: make for name, make in {**PLAIN, **VARIED}.items() if not make(2, 2).kernels}


def expected(schedule: Schedule, buffers: list[Tensor]) -> Tensor:
    """What the work buffer is about: the sum of all, or each holder's values."""
    if schedule.kind in REDUCING:
        return torch.stack(buffers).sum(0)
    result = buffers[0].clone()
    for rank, buffer in enumerate(buffers):
        for start, stop in schedule.held(rank):
            result[start:stop] = buffer[start:stop]
    return result


@pytest.mark.parametrize("inline", [0, 10**6])
@pytest.mark.parametrize("name", RUNS)
def test_every_algorithm_runs_in_segments(name: str, inline: int) -> None:
    make: Callable[[int, int], Schedule] = RUNS[name]
    for world, window in ((2, 4), (3, 1), (6, 2)):
        schedule = make(world, COUNT)
        buffers = [torch.arange(schedule.count).remainder(7).float() + 10 * rank for rank in range(world)]
        values = expected(schedule, buffers)
        for rank, result in enumerate(execute(schedule, buffers, SEGMENT, window, inline)):
            wanted = [values[start:stop] for start, stop in schedule.wanted(rank)]
            assert torch.equal(result, torch.cat([*wanted, values[:0]])), (world, rank)
