"""Quantized and reproducible all-reduces of real processes: bits, and members that die in the middle."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from collectives.communicator import Communicator
from tests.conformance import numerics
from tests.harness.cluster import Cluster
from tests.harness.residents import Residents

GROUPS = [("gloo", 3), ("sockets", 5), ("shm", 2), ("shm", 4)]


@pytest.mark.parametrize(("transport", "world"), GROUPS)
def test_results_are_those_of_arithmetic_and_equal_on_all_members(transport: str, world: int) -> None:
    functions: list[Callable[..., Any]] = [
        numerics.quantize_everything,
        numerics.round_at_random,
        numerics.feed_back,
        numerics.add_tensors_reproducibly,
    ]
    with Communicator.solo() as comm:
        alone = numerics.add_reproducibly(comm)
    with Residents(world, transport=transport) as group:
        for function in functions:
            first, *others = group.run(function)
            assert first, "it checked nothing"
            assert all(digests == first for digests in others), function.__name__
        for digests in group.run(numerics.add_reproducibly):
            assert digests == alone, "the bits depend on who adds"


def test_one_member_is_no_special_case() -> None:
    with Communicator.solo() as comm:
        numerics.quantize_everything(comm)
        numerics.round_at_random(comm)
        numerics.feed_back(comm)
        numerics.add_tensors_reproducibly(comm)


def test_r8_a_run_with_stochastic_rounding_can_be_repeated() -> None:
    runs = []
    for transport in ("sockets", "gloo"):
        with Residents(2, transport=transport) as group:
            runs.append(group.run(numerics.round_at_random))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["quantized", "reproducible", "raise"])
@pytest.mark.parametrize(
    ("point", "victim", "transport"),
    [
        ("enter", 0, "gloo"),
        ("transfer", 1, "sockets"),
        ("transfer", 3, "gloo"),
        ("end", 2, "gloo"),
        ("staged", 0, "gloo"),
    ],
)
def test_a_death_in_the_middle_ends_alike_on_all_survivors(kind: str, point: str, victim: int, transport: str) -> None:
    with Cluster(founders=4, transport=transport) as cluster:
        peers = cluster.peers(numerics.mortal, 4, kind=kind, point=point, victim=victim)
        endings = [process.ending() for process in peers]
        reports = [process.result() for process, end in zip(peers, endings, strict=True) if not end.signal]
        assert [end.signal for end in endings if end.signal] == [signal.SIGKILL]
    assert len(reports) == 3
    for report in reports:
        assert report == reports[0]
        assert report["intact"]
        if report["lost"]:
            assert kind == "raise"
            assert not report["residual"], "a failed operation has changed the residual"
        else:
            assert report["right"], "the bits are not those of the contributors"
            assert kind != "raise" or report["contributors"] == report["before"]
            assert len(report["contributors"]) >= 3
