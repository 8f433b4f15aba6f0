"""Rule R11 and the eviction of silent members: stopped, absent, cut off."""

import pytest

from collectives.membership.protocol import Status
from tests.conformance import silences
from tests.conformance.steering import Crew
from tests.harness.cluster import Cluster


def stop_and_wake(cluster: Cluster, point: str) -> list[int]:
    """Stop one of three members until it is evicted, wake it and see it come back; who was in the first result."""
    joined = cluster.peers(silences.stopped, 3, point=point)
    members = sorted(joined, key=lambda process: process.expect("rank")["rank"])
    assert members[1].expect("here")["where"].startswith(point)
    members[1].stop()
    # It has not said "seen" before the others are done: it is stopped for as long as they need to evict it.
    for process in (members[0], members[2]):
        process.expect("done")
    members[1].tell("woken")
    members[1].wake()
    seen: list[list[list[int]]] = [members[0].result()["seen"], members[2].result()["seen"]]
    stopped = members[1].result()
    assert "taken for dead" in stopped["said"]
    assert stopped["rejoined"] == 4
    assert seen[0] == seen[1]
    assert all(len(contributors) == 2 for contributors in seen[0][1:])
    return seen[0][0]


@pytest.mark.parametrize("point", ["enter", "transfer", "staged", "confirmed"])
def test_r11_a_stopped_member_is_evicted_and_its_bytes_reach_nobody(point: str) -> None:
    with Cluster(founders=3, heartbeat=0.1, heartbeat_timeout=2.0) as cluster:
        first = stop_and_wake(cluster, point)
    assert len(first) in ({2} if point == "enter" else {3} if point == "confirmed" else {2, 3})


def test_r11_a_member_that_does_not_come_is_evicted_after_the_operation_timeout() -> None:
    with Cluster(founders=3, heartbeat=0.1, heartbeat_timeout=2.0, op_timeout=0.7) as cluster:
        results = cluster.run(silences.absent, 3)
    gone = [result["said"] for result in results if "said" in result]
    assert len(gone) == 1
    assert "absent from operation 2 of lane 'main' for 0.7 s" in gone[0]
    assert [len(result["seen"]) for result in results if "seen" in result] == [2, 2]


def test_r11_a_member_that_comes_late_is_waited_for() -> None:
    with Cluster(founders=2, heartbeat=0.1, op_timeout=30.0) as cluster:
        assert cluster.run(silences.slow, 2) == [[1, 2], [1, 2]]


def test_r11_a_failed_link_is_made_again_among_the_same_members() -> None:
    with Cluster(founders=3) as cluster:
        members = cluster.peers(silences.cut, 3, times=1)
        results = [process.result() for process in members]
        assert sum(process.said("cut") and process.expect("cut")["links"] for process in members) == 1
    for result in results:
        assert result["seen"] == [[1, 2, 3], [1, 2, 3]]
        assert result["epochs"] == [[], []]


def test_r11_a_link_that_fails_again_costs_one_of_its_ends_its_place() -> None:
    with Cluster(founders=3) as cluster:
        results = {result["rank"]: result for result in cluster.run(silences.cut, 3, times=2)}
    assert "links to [1] failed twice" in results[2]["said"]
    assert results[0]["seen"] == results[1]["seen"] == [[1, 2, 3], [1, 2]]


@pytest.mark.parametrize("failure", ["transport", "system"])
def test_r11_an_epoch_that_cannot_be_built_is_followed_by_another(failure: str) -> None:
    with Cluster(founders=3) as cluster:
        results = [result for result in cluster.run(silences.unbuilt, 3, failure=failure) if result]
    assert [result["seen"] for result in results] == [[1, 2], [1, 2]]
    assert sum(result["fired"] for result in results) == 1
    assert [result["epochs"][:3] for result in results] == [[[], [3], []]] * 2


def test_r11_the_status_tells_who_waits_for_whom() -> None:
    with Cluster(founders=2, heartbeat=0.05) as cluster:
        crew = Crew(cluster)
        crew.found(2)
        crew.start("reduce", crew.members[:1], times=1)

        def waits(status: Status) -> bool:
            rows = {row.member: {lane.lane: lane for lane in row.lanes} for row in status.members}
            lane = rows[1].get("main")
            return lane is not None and lane.phase == "waiting" and lane.waiting_for == 2 and lane.seconds > 0.2

        status = cluster.await_status(waits)
        lane = next(row.lanes[0] for row in status.members if row.member == 1)
        assert (lane.kind, lane.seq) == ("all_reduce", 1)
        crew.start("reduce", crew.members[1:], times=1)
        assert [answer["contributors"] for answer in crew.done()] == [[1, 2]] * 2
        cluster.await_status(lambda status: all(lane.phase == "idle" for row in status.members for lane in row.lanes))
        crew.leave()
