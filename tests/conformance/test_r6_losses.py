"""Rules R2, R3 and R6: a member of any rank dies at any point of any operation.

With RINGHOLD_LONG=1 in the environment every rank dies at every point of every kind on every transport, else each in
turn:

    RINGHOLD_LONG=1 pytest tests/conformance/test_r6_losses.py
"""

import signal
from itertools import product
from typing import Any

import pytest

from collectives.faults import POINTS
from tests.conformance.kinds import KINDS
from tests.conformance.losses import cascade, half_way, many_lanes, mortal, only_finisher
from tests.conformance.transports import LENDING, LONG, TRANSPORTS
from tests.harness.cluster import Cluster, Process

WORLD = 4
SIZES = ("small", "bulk")


def deaths() -> list[tuple[str, list[str], int, str, str]]:
    """Kind, point of each of three deaths, rank of the first victim, size, transport."""
    cases: list[tuple[str, list[str], int, str, str]] = []
    for kind, this in KINDS.items():
        points = [point for point in POINTS if point not in this.never]
        every = LONG or kind == "all_reduce"
        groups = [[point] * 3 for point in points] if every else [points[i::2][:3] for i in range(2)]
        if not every and len(points) > 6:
            groups.append(points[-2:] + points[:1])
        for number, group in enumerate(groups):
            chosen = (group + points)[:3]
            for rank in range(WORLD) if every else [(len(cases) + number) % WORLD]:
                turn = len(cases) + rank
                sizes = SIZES if LONG else (SIZES[turn % 2],)
                transports = TRANSPORTS if LONG else (TRANSPORTS[turn % 3],)
                cases += [(kind, chosen, rank, size, transport) for size, transport in product(sizes, transports)]
    return cases


def _named(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def judge(reports: list[dict[str, Any]], kind: str, point: str, victim: int, transport: str) -> None:
    """The contract of the kind, on all survivors alike."""
    first, this = reports[0], KINDS[kind]
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
            silent = ("enter", "begin") if this.gives and transport not in LENDING else ("enter",)
            assert point not in silent, "the victim had given nothing"
            # Whoever had not staged cannot have confirmed either: only the change can have completed it (R3).
            if point in ("transfer", "reduce", "end"):
                assert all(report["from_staging"] for report in reports)
            return
        assert this.elastic, "a kind that must not shrink did"
        assert first["contributors"] == survivors
    else:
        assert not this.elastic, "survivors could have gone on"
        assert first["lost"] == [dead]
        assert first["survivors"] == survivors
        assert f"lost member {dead}" in first["error"]
    assert this.first or point not in ("confirmed", "copied"), "the victim had a result that the survivors lack"


@pytest.mark.parametrize(("kind", "points", "rank", "size", "transport"), deaths(), ids=_named)
def test_r6_a_death_ends_alike_on_all_survivors(
    kind: str, points: list[str], rank: int, size: str, transport: str
) -> None:
    victims = [rank, (rank + 1) % (WORLD - 1), rank % (WORLD - 2)]
    with Cluster(founders=WORLD, transport=transport) as cluster:
        living = cluster.peers(mortal, WORLD, kind=kind, points=points, size=size, victims=victims)
        for victim, point in zip(victims, points, strict=True):
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


def test_r4_who_gives_up_between_two_operations_of_a_call_has_departed() -> None:
    with Cluster(founders=3) as cluster:
        reports = cluster.run(half_way, 3)
    [departed] = [report for report in reports if "error" in report]
    assert "KeyboardInterrupt inside all_gather_v" in departed["error"]
    for report in reports:
        if report is not departed:
            assert report["right"]
            assert len(report["contributors"]) == 2


@pytest.mark.parametrize("skip", [0, 7, 19])
def test_r3_each_lane_goes_on_from_where_it_stood(skip: int) -> None:
    with Cluster(founders=4) as cluster:
        stories = survivors_of(cluster.peers(many_lanes, 4, skip=skip), deaths=1)
    assert stories[1:] == [stories[0]] * 2
    assert [1, 3, 4] in stories[0]  # at least the operation in which it died; a lane may have been done before
