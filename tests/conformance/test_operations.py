"""Every operation on every transport and world size against arithmetic in one process; the same bits on all members."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from collectives.communicator import Communicator
from tests.conformance import operations
from tests.conformance.transports import TRANSPORTS, WORLDS
from tests.harness.residents import Residents

CASES = [("", 0), *((transport, world) for transport in TRANSPORTS for world in WORLDS[transport])]

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}" if case[0] else "solo")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a function of `operations` on all members of a group; returns what it returned, by rank."""
    transport, world = request.param
    if not transport:
        with Communicator.solo() as comm:
            yield lambda function: [function(comm)]
        return
    with Residents(world, transport=transport, check_inputs=world == 3) as group:
        yield group.run


@pytest.mark.parametrize(
    "function",
    operations.RESULTS,
    ids=lambda function: function.__name__,
)
def test_results_are_those_of_arithmetic_and_equal_on_all_members(run: Run, function: Callable[..., Any]) -> None:
    first, *others = run(function)
    assert first, "it checked nothing"
    for rank, digests in enumerate(others, start=1):
        assert digests == first, f"rank {rank} has other bits than rank 0"


def test_nobody_leaves_a_barrier_before_all_have_entered(run: Run) -> None:
    for times in zip(*run(operations.barriers), strict=True):
        assert max(entered for entered, _ in times) <= min(left for _, left in times)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_check_inputs_names_who_changed_an_input_under_way(transport: str) -> None:
    with Residents(2, transport=transport, check_inputs=True) as group:
        first, second = group.run(operations.meddle)
    assert "the input of all_reduce 1 was changed" in first
    assert second == ""


def test_members_whose_counts_differ_are_all_told_so(run: Run) -> None:
    first, *others = run(operations.disagree_on_counts)
    assert len(first) == (3 if others else 0)
    assert all(said == first for said in others)


def test_memory_that_a_call_under_way_writes_is_nobody_elses(run: Run) -> None:
    first, *others = run(operations.clash)
    assert first == []
    for said in others:
        assert len(said) == 4
        assert all("under way on the same memory" in text for text in said)
