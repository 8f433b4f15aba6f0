"""Rules R1, R4 and R5: one thread a lane, no local verdicts, and when a caller sees that the membership changed."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.conformance import lanes
from tests.harness.cluster import Cluster
from tests.harness.residents import Residents


@pytest.fixture(scope="module")
def group() -> Iterator[Residents]:
    with Residents(3, heartbeat=0.1, heartbeat_timeout=2.0, op_timeout=1.0) as residents:
        yield residents


def test_r1_a_lane_is_used_by_one_thread_at_a_time(group: Residents) -> None:
    said = group.run(lanes.misuse_lane)[0]
    assert "lane 'x' is in use by another thread" in said
    assert "admit() needs every lane idle; wait for the operations on x first" in said


def test_r1_lanes_whose_channels_collide_are_refused(group: Residents) -> None:
    for said in group.run(lanes.same_channel):
        assert said == "lanes 'two' and 'one' cannot be used together; rename one of them"


def test_r4_a_wait_that_times_out_cancels_nothing(group: Residents) -> None:
    assert group.run(lanes.wait_briefly) == [[6.0] * 3] * 3


def test_r11_crossed_waits_raise_on_every_member(group: Residents) -> None:
    for said in group.run(lanes.crossed):
        for text in said:
            assert "wait for each other on different members" in text


@pytest.mark.parametrize(
    ("point", "contributors"),
    [
        ("signal", {2}),
        ("enter", {2}),
        ("begin", {2}),
        ("transfer", {2, 3}),
        ("reduce", {2, 3}),
        ("staged", {2, 3}),
        ("confirmed", {3}),
    ],
)
def test_r4_whoever_is_interrupted_has_departed_and_may_join_again(point: str, contributors: set[int]) -> None:
    with Cluster(founders=3) as cluster:
        joined = cluster.peers(lanes.interrupted, 3, point=point)
        members = sorted(joined, key=lambda process: process.expect("rank")["rank"])
        assert "of all_reduce 2" in members[2].expect("fired")["where"]
        if point == "signal":
            time.sleep(0.1)
            members[2].signal(signal.SIGINT)
            for process in members[:2]:
                process.tell("go")
        results = [process.result() for process in members]
    gone = [result for result in results if "said" in result]
    rest = [result for result in results if "said" not in result]
    assert len(gone) == 1
    assert gone[0]["member"] == 4
    assert "KeyboardInterrupt inside all_reduce 2 of lane 'main'" in gone[0]["said"]
    assert rest[0] == rest[1]
    assert rest[0]["right"]
    assert len(rest[0]["contributors"]) in contributors


@pytest.mark.parametrize(
    ("point", "story"),
    [
        ("copied", ["4 contributors", "lost", "call resume() first"]),
        ("confirmed", ["4 contributors", "lost", "call resume() first"]),
        ("enter", ["lost", "call resume() first", "call resume() first"]),
    ],
)
def test_r5_on_loss_raise_ends_alike_and_halts_the_lane(point: str, story: list[str]) -> None:
    with Cluster(founders=4) as cluster:
        members = cluster.peers(lanes.halted, 4, point=point)
        endings = [process.ending() for process in members]
    assert [ending.signal for ending in endings].count(signal.SIGKILL) == 1
    values = [ending.value for ending in endings if not ending.signal]
    assert [value["story"] for value in values] == [story] * 3
    assert [value["members"] for value in values] == [values[0]["members"]] * 3


@pytest.mark.parametrize(
    ("kind", "on_loss", "story"),
    [
        ("reduce_scatter", "retry", ["lost", "lost", "lost"]),
        ("reduce_scatter", "raise", ["lost", "lost", "lost"]),
        ("all_reduce", "raise", ["lost", "lost", "lost"]),
        ("all_reduce", "retry", ["3 contributors", "3 contributors", "3 contributors"]),
    ],
)
def test_r5_operations_queued_before_a_loss_keep_their_view(kind: str, on_loss: str, story: list[str]) -> None:
    with Cluster(founders=4) as cluster:
        endings = [process.ending() for process in cluster.peers(lanes.queued, 4, kind=kind, on_loss=on_loss)]
    assert [ending.signal for ending in endings].count(signal.SIGKILL) == 1
    assert [ending.value["story"] for ending in endings if not ending.signal] == [story] * 3


def test_r5_the_membership_changes_when_a_wait_returns() -> None:
    with Cluster(founders=3) as cluster:
        endings = [process.ending() for process in cluster.peers(lanes.view, 3)]
    assert [ending.signal for ending in endings].count(signal.SIGKILL) == 1
    for ending in endings:
        if not ending.signal:
            before, after = ending.value
            assert before == [1, 2, 3]
            assert len(after) == 2
