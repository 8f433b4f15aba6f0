"""Rules R14 and R15: a step counts on all members or on none; the state outlives whoever gives it.

More on `sync` stands in `tests/collectives/test_sync.py` and `test_sync_processes.py`.
"""

import signal
from typing import Any

import pytest

from tests.conformance import steps
from tests.harness.cluster import Cluster


@pytest.mark.parametrize(
    ("bucket", "point", "how", "repeated"),
    [
        (0, "copied", {}, True),
        (1, "copied", {}, True),
        (0, "transfer", {}, True),
        (2, "enter", {}, True),
        (1, "staged", {}, True),
        # The agreement itself: all buckets were complete on all members.
        (3, "enter", {}, False),
        (3, "copied", {}, False),
        (1, "enter", {"on_loss": "raise"}, True),
        (0, "copied", {"on_loss": "raise", "catch": True}, True),
        (1, "enter", {"overlap": True}, True),
        (2, "copied", {"overlap": True}, None),
    ],
)
def test_r15_a_step_counts_on_all_members_or_on_none(
    bucket: int, point: str, how: dict[str, Any], repeated: bool | None
) -> None:
    given = {"on_loss": "retry", "catch": False, "overlap": False, **how}
    with Cluster(founders=4) as cluster:
        members = cluster.peers(steps.stepping, 4, bucket=bucket, point=point, **given)
        endings = {process: process.ending() for process in members}
        victims = [process for process, ending in endings.items() if ending.signal == signal.SIGKILL]
        assert len(victims) == 1
        assert victims[0].expect("fired")["where"].startswith(point)
        living = [process for process in members if process not in victims]
        first, *others = [process.result() for process in living]
        assert others == [first] * 2
        sizes = [len(contributors) for contributors in first["history"]]
        tries = [[process.expect("step")["committed"] for _ in range(3)] for process in living]
    assert tries == [tries[0]] * 3
    assert tries[0][0]
    assert sizes[0] == 4
    assert sizes[2] == 3
    if repeated is not None:
        assert tries[0][1] is not repeated
        assert sizes[1] == (3 if repeated else 4)


def test_r15_an_error_of_the_caller_passes_through() -> None:
    with Cluster(founders=2) as cluster:
        assert cluster.run(steps.raising, 2) == ["the batch is bad"] * 2


def test_r14_when_the_last_that_holds_the_state_dies_it_is_lost_and_nothing_is_touched() -> None:
    with Cluster(founders=1) as cluster:
        founder = cluster.peer(steps.losing_state)
        founder.expect("founded")
        joiners = cluster.peers(steps.losing_state, 2)
        cluster.await_status(lambda status: status.waiting == 2)
        founder.tell("go")
        assert founder.ending().signal == signal.SIGKILL
        for process in joiners:
            result = process.result()
            assert "none of the members [2, 3] is a founder or has completed a sync" in result["said"]
            assert result["intact"]


@pytest.mark.parametrize("point", ["enter", "end", "staged"])
def test_r14_the_state_outlives_a_giver(point: str) -> None:
    with Cluster(founders=2) as cluster:
        founders = cluster.peers(steps.surviving_state, 2, point=point)
        for process in founders:
            process.expect("trained")
        joiners = cluster.peers(steps.surviving_state, 2, point=point)
        cluster.await_status(lambda status: status.waiting == 2)
        for process in founders:
            process.tell("go")
        endings = [process.ending() for process in [*founders, *joiners]]
    assert [ending.signal for ending in endings].count(signal.SIGKILL) == 1
    results = [ending.value for ending in endings if not ending.signal]
    assert results == [results[0]] * 3
    assert results[0]["step"] == 3
    assert results[0]["voters"] == [1, 2]


def test_r15_what_one_member_saw_counts_for_all() -> None:
    with Cluster(founders=4) as cluster:
        endings = [process.ending() for process in cluster.peers(steps.apart, 4)]
    assert [ending.signal for ending in endings].count(signal.SIGKILL) == 1
    assert [ending.value for ending in endings if not ending.signal] == [[False, True]] * 3
