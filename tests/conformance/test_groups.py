"""Sub-groups: what happens outside of one does not disturb it, what happens inside ends alike for all of it (R6)."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from collectives.membership.claims import lane_of
from collectives.membership.protocol import Status
from tests.conformance import groups
from tests.conformance.test_r6_losses import judge, survivors_of
from tests.conformance.transports import TRANSPORTS
from tests.harness.cluster import Cluster, Process
from tests.harness.residents import Residents


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_every_kind_runs_in_overlapping_sub_groups_at_once(transport: str) -> None:
    with Residents(4, transport=transport) as residents:
        assert residents.run(groups.every_kind) == [[]] * 4


def test_what_is_no_sub_group_is_refused() -> None:
    with Residents(2) as residents:
        for me, said in enumerate(residents.run(groups.refused), start=1):
            other = 3 - me
            assert said == [
                f"sub-group [{me}, {me}]: a member is in it twice",
                f"sub-group [{me}, 77]: [77] are no members; the members are [1, 2] (ids)",
                f"sub-group [{other}]: this member, {me}, is not in it; only its members ask for it",
                f"sub-group []: this member, {me}, is not in it; only its members ask for it",
                f"sub-group 'mine' is [{me}], not [{me}, {other}]; take another name",
                "sub-group 'a@b': a name has 1 to 48 printable characters and none of @ # >",
                f"sub-group '{me}' was closed; ask the communicator for it again",
                "lane 'x#y': a name has 1 to 48 printable characters and none of @ # >",
            ]


def by_rank(members: list[Process]) -> list[Process]:
    """Sort those that say their rank."""
    return sorted(members, key=lambda process: process.expect("rank")["rank"])


def has_settled(status: Status, members: int) -> bool:
    """Whether the coordinator knows so many members and is in no change."""
    return len(status.members) == members and not status.change


@pytest.mark.parametrize("point", ["begin", "staged"])
def test_r6_the_death_of_an_outsider_disturbs_nobody(transport: str, point: str) -> None:
    kinds = ["all_reduce", "reduce_scatter", "all_gather to out", "exchange"]
    with Cluster(founders=3 + len(kinds), transport=transport) as cluster:
        members = by_rank(cluster.peers(groups.outsider_dies, 3 + len(kinds), kinds=kinds, point=point))
        inside = members[:3]
        for number, victim in enumerate(members[3:]):
            held, left = inside[number % 3], len(members) - 1 - number
            assert held.expect("reached")["where"].startswith(point)
            victim.kill()
            cluster.await_status(functools.partial(has_settled, members=left))
            held.tell("killed")
            reports = [process.expect("report") for process in inside]
            for report in reports:
                assert report["contributors"] == report["before"] == report["after"], report
                assert report["right"]
                assert report["intact"]
                # It was disturbed indeed: run again, or completed from what all of them had staged.
                assert report["from_staging"] or report["epoch"] > number + 1
        for process in inside:
            process.tell("leave")
            process.result()


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        ("all_reduce", "transfer"),
        ("all_reduce", "staged"),
        ("all_gather", "enter"),
        ("reduce_scatter", "transfer"),
        ("broadcast from the victim", "begin"),
        ("exchange", "confirmed"),
    ],
)
def test_r6_the_death_of_a_member_is_a_matter_of_its_sub_group(transport: str, kind: str, point: str) -> None:
    with Cluster(founders=5, transport=transport) as cluster:
        reports = survivors_of(cluster.peers(groups.insider_dies, 5, kind=kind, point=point), deaths=1)
    inside = [report for report in reports if report]
    assert len(inside) == 2
    judge(inside, kind, point, 0, transport)


@pytest.mark.parametrize("skip", [0, 5, 17])
def test_r3_lanes_of_overlapping_sub_groups_are_recovered_each_on_its_own(transport: str, skip: int) -> None:
    with Cluster(founders=4, transport=transport) as cluster:
        stories = survivors_of(cluster.peers(groups.busy_lanes, 4, skip=skip), deaths=1)
    seen: dict[str, list[Any]] = {}
    for story in stories:
        for place, contributors in story.items():
            assert seen.setdefault(place, contributors) == contributors
    assert set(seen) == {"low a", "low b", "high a"}
    for place, contributors in seen.items():
        whole, rest = ([1, 2, 3], [1, 3]) if place.startswith("low") else ([2, 3, 4], [3, 4])
        # All that came after the loss were without the victim.
        assert sorted(contributors, key=len, reverse=True) == contributors
        assert all(who in (whole, rest) for who in contributors)
        assert contributors[-1] == rest


def test_r5_on_loss_raise_halts_a_lane_of_the_sub_group_and_no_other() -> None:
    with Cluster(founders=3) as cluster:
        stories = survivors_of(cluster.peers(groups.halting, 3), deaths=1)
    assert sorted(stories) == [[], ["lost", "call resume() first", "1", "1"]]


@pytest.mark.parametrize(("point", "on_loss"), [("copied", "retry"), ("enter", "retry"), ("enter", "raise")])
def test_r15_a_step_sees_the_losses_of_sub_groups(point: str, on_loss: str) -> None:
    with Cluster(founders=4) as cluster:
        stories = survivors_of(cluster.peers(groups.stepping, 4, point=point, on_loss=on_loss), deaths=1)
    assert stories == [[False, True]] * 3


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        # Two of them wait for each other.
        ([[0, 1], [0, 1, 2], [0, 1, 2]], [0, 0, 0]),
        ([[0, 1, 2], [2, 1, 0], [0, 1, 2]], [0, 0, 0]),
        # One waits for another that goes on with a third.
        ([[0, 1], [1, 2], [1, 2]], [0, 1, 1]),
    ],
)
def test_r9_members_that_mean_different_ones_by_a_name_are_told_so(
    transport: str, claims: list[list[int]], good: list[int]
) -> None:
    with Cluster(founders=3, transport=transport) as cluster:
        results = cluster.run(groups.disputed, 3, claims=claims, times=2)
    for result in results:
        for said in result["said"]:
            assert said.startswith("members disagree about who is in the sub-group 'tp': member ")
    assert sorted(int(result["good"] > 0) for result in results) == sorted(good)


def test_r13_joiners_come_in_when_sub_groups_are_idle_and_are_in_none() -> None:
    with Cluster(founders=2) as cluster:
        founders = by_rank(cluster.peers(groups.admitting, 2))
        joiner = cluster.peer(groups.admitting)
        cluster.await_status(lambda status: status.waiting == 1)
        founders[0].expect("busy")
        founders[0].tell("go")
        results = [process.result() for process in (*founders, joiner)]
    busy = lane_of("1,2", (1, 2), "aux")
    said = f"admit() needs every lane idle; wait for the operations on {busy} first"
    assert sorted(result["said"] for result in results) == ["", "", said]
    assert [result["all"] for result in results] == [[1, 2, 3]] * 3


def test_sub_groups_and_messages_cost_the_coordinator_nothing() -> None:
    with Cluster(coordinator=False, founders=3) as cluster:
        coordinator = cluster.peer(groups.counting, founders=3, journal=str(cluster.journal))
        cluster.port = coordinator.expect("listening")["port"]
        members = cluster.peers(groups.frugal, 3)
        counts = []
        for begun, word in (("begins", "go"), ("ends", "leave")):
            for process in members:
                process.expect(begun)
            coordinator.tell("count")
            counts.append(coordinator.expect("counted")["seen"])
            for process in members:
                process.tell(word)
        before, after = counts
        assert {kind for kind in after if after[kind] != before.get(kind, 0)} <= {"Beat"}
        for process in members:
            process.result()
