"""The transport mpi in jobs of real `mpirun`, with Open MPI and MPICH: results, deaths, stops, who may come."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conformance import operations
from tests.harness.mpi import MPICH, OPEN_MPI
from tests.harness.residents import Residents

LIBRARIES = {"openmpi": OPEN_MPI, "mpich": MPICH}
CASES = [(library, world) for library in LIBRARIES for world in (1, 2, 3, 4, 5, 8)]
FUNCTIONS = [
    operations.reduce_everything,
    operations.reduce_every_shape,
    operations.reduce_segments,
    operations.reduce_roughly,
    operations.scatter_reductions,
    operations.gather_rows,
    operations.broadcast_from_each,
    operations.run_schedules,
    operations.overlap,
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def group(request: pytest.FixtureRequest) -> Iterator[Residents]:
    """The ranks of a job."""
    library, world = request.param
    with Residents(world, transport="mpi", cluster=LIBRARIES[library]) as group:
        yield group


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_results_are_those_of_arithmetic_and_equal_on_all_ranks(group: Residents, function: Callable[..., Any]) -> None:
    first, *others = group.run(function)
    assert first, "it checked nothing"
    for rank, digests in enumerate(others, start=1):
        assert digests == first, f"rank {rank} has other bits than rank 0"
