"""The engine over gloo, in real processes: every algorithm, dtype and size gives exactly what arithmetic says."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from tests.collectives.crew import Crew, crew_of, values_of

WORLDS = (2, 3, 4, 5)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with crew_of(5) as made:
        yield made


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, crew: Crew) -> int:
    crew.connect(request.param)
    assert isinstance(request.param, int)
    return request.param


def reduced(world: int, count: int, dtype: str, op: str = "sum") -> torch.Tensor:
    """What all ranks together give, in a dtype that holds it exactly."""
    stack = torch.stack([values_of(rank, count, getattr(torch, dtype)) for rank in range(world)]).to(torch.float64)
    made = {"sum": stack.sum, "prod": stack.prod, "min": stack.amin, "max": stack.amax}[op](0)
    assert isinstance(made, torch.Tensor)
    return made


def run(crew: Crew, world: int, **case: Any) -> list[list[float]]:
    case.setdefault("dtype", "float32")
    return [values for values, _ in crew.run("collective", world, case=case)]


DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")
COUNTS = (1, 3, 1000, 40_001)


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional", "doubling"])
def test_all_reduce_is_exact_for_every_dtype_and_size(crew: Crew, world: int, algorithm: str) -> None:
    for dtype, count in product(DTYPES, COUNTS):
        expected = reduced(world, count, dtype).tolist()
        results = run(crew, world, algorithm=algorithm, kind="all_reduce", count=count, dtype=dtype, segment=32_000)
        for rank, result in enumerate(results):
            assert result == expected, (dtype, count, rank)
