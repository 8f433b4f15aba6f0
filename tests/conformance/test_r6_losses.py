"""Rules R2, R3 and R6: a member of any rank dies at any point of any operation.

With RINGHOLD_LONG=1 in the environment every rank dies at every point of every kind on every transport, else each in
turn:

    RINGHOLD_LONG=1 pytest tests/conformance/test_r6_losses.py
"""

import os
import signal
from itertools import product
from typing import Any

import pytest

from collectives.faults import POINTS
from tests.conformance.losses import cascade, many_lanes, mortal, only_finisher
from tests.conformance.transports import LENDING, TRANSPORTS
from tests.harness.cluster import Cluster, Process

KINDS = (
    "all_reduce",
    "all_reduce out of place",
    "reduce_scatter",
    "all_gather",
    "all_gather to out",
    "broadcast from a survivor",
    "broadcast from the victim",
    "barrier",
    "exchange",
)
ELASTIC = ("all_reduce", "all_reduce out of place", "all_gather", "broadcast from a survivor", "barrier")
NEVER = {
    "all_gather": ("reduce",),
    "all_gather to out": ("reduce",),
    "broadcast from a survivor": ("reduce",),
    "broadcast from the victim": ("transfer", "reduce"),
    "barrier": ("transfer", "reduce"),
}
"""Points that a kind does not pass."""

LONG = os.environ.get("RINGHOLD_LONG") == "1"
WORLD = 4
SIZES = ("small", "bulk")


def deaths() -> list[tuple[str, str, int, str, str]]:
    """Kind, point, rank of the first victim, size, transport."""
    cases = []
    pairs = [(kind, point) for kind, point in product(KINDS, POINTS) if point not in NEVER.get(kind, ())]
    for number, (kind, point) in enumerate(pairs):
        every = LONG or kind == "all_reduce"
        for rank in range(WORLD) if every else [(number + number // WORLD) % WORLD]:
            turn = number + rank
            sizes = SIZES if LONG else (SIZES[turn % 2],)
            transports = TRANSPORTS if LONG else (TRANSPORTS[turn % 3],)
            cases += [(kind, point, rank, size, transport) for size, transport in product(sizes, transports)]
    return cases


def judge(reports: list[dict[str, Any]], kind: str, point: str, victim: int, transport: str) -> None:
    """The contract of the kind, on all survivors alike."""
    first = reports[0]
    before = first["before"]
    dead = before[victim]
    survivors = [member for member in before if member != dead]
    assert sorted(report["member"] for report in reports) == sorted(survivors)
    for report in reports:
        assert report["before"] == before
        assert report["after"] == (before if report.get("contributors") == before else survivors)
        assert report["intact"], "inputs were touched"
        for key in ("contributors", "bits", "epoch", "lost", "survivors"):
            assert report.get(key) == first.get(key), f"the survivors saw different {key}"
    if "contributors" in first:
        assert all(report["right"] for report in reports)
        if first["contributors"] == before:
            # In a barrier nobody gives anything, and in a broadcast only the root must.
            early = transport in LENDING or kind in ("barrier", "broadcast from a survivor")
            silent = ("enter",) if early else ("enter", "begin")
            assert point not in silent, "the victim had given nothing"
            # Whoever had not staged cannot have confirmed either: only the change can have completed it (R3).
            if point in ("transfer", "reduce", "end"):
                assert all(report["from_staging"] for report in reports)
            return
        assert kind in ELASTIC, "a kind that must not shrink did"
        assert first["contributors"] == survivors
    else:
        assert kind not in ELASTIC, "survivors could have gone on"
        assert first["lost"] == [dead]
        assert first["survivors"] == survivors
        assert f"lost member {dead}" in first["error"]
    assert point not in ("confirmed", "copied"), "the victim had returned a result that the survivors lack"


@pytest.mark.parametrize(("kind", "point", "rank", "size", "transport"), deaths())
def test_r6_a_death_ends_alike_on_all_survivors(kind: str, point: str, rank: int, size: str, transport: str) -> None:
    victims = [rank, (rank + 1) % (WORLD - 1), rank % (WORLD - 2)]
    # In recursive doubling some ranks reduce nothing.
    algorithm = "ring" if point == "reduce" else "auto"
    with Cluster(founders=WORLD, transport=transport) as cluster:
        living = cluster.peers(mortal, WORLD, kind=kind, point=point, size=size, victims=victims, algorithm=algorithm)
        for victim in victims:
            reports = []
            for process in list(living):
                word = process.expect("report", "fired")
                if word["event"] == "report":
                    reports.append(word)
                    continue
                assert word["where"].startswith(f"{point} of {kind.split(maxsplit=1)[0]}")
                assert process.ending().signal == signal.SIGKILL
                living.remove(process)
            judge(reports, kind, point, victim, transport)
        for process in living:
            process.result()


def survivors_of(members: list[Process], deaths: int) -> list[Any]:
    """What those returned that did not die; the others must have died where they were meant to."""
    endings = {process: process.ending() for process in members}
    dead = [process for process, ending in endings.items() if ending.signal == signal.SIGKILL]
    assert len(dead) == deaths
    assert all(process.said("fired") for process in dead)
    return [process.result() for process in members if process not in dead]


@pytest.mark.parametrize("event", ["fenced", "epoch", "ready"])
def test_r3_a_second_death_while_the_first_is_handled(event: str) -> None:
    with Cluster(founders=5) as cluster:
        reports = survivors_of(cluster.peers(cascade, 5, event=event), deaths=2)
    for report in reports:
        assert report["right"]
        assert report["contributors"] in ([1, 3, 5], [1, 3, 4, 5])
        assert report["contributors"] == reports[0]["contributors"]
        assert report["bits"] == reports[0]["bits"]
    if event != "ready":
        assert reports[0]["contributors"] == [1, 3, 5]


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "broadcast from a survivor", "exchange"])
@pytest.mark.parametrize("point", ["confirmed", "copied"])
def test_r2_what_the_only_finisher_returned_all_survivors_return(kind: str, point: str) -> None:
    with Cluster(founders=3) as cluster:
        members = cluster.peers(only_finisher, 3, kind=kind, point=point)
        for report in survivors_of(members, deaths=1):
            assert report["contributors"] == [1, 2, 3]
            assert report["from_staging"]
            assert report["right"]


@pytest.mark.parametrize("skip", [0, 7, 19])
def test_r3_each_lane_goes_on_from_where_it_stood(skip: int) -> None:
    with Cluster(founders=4) as cluster:
        stories = survivors_of(cluster.peers(many_lanes, 4, skip=skip), deaths=1)
    assert stories[1:] == [stories[0]] * 2
    assert stories[0][-1] == [1, 3, 4]
