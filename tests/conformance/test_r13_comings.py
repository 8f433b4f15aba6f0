"""Rule R13 and joining: peers come at safe points, leave, die on the way, found a run anew, or are refused."""

import signal
import time
from typing import Any

import pytest

from tests.conformance.steered import dies_joining, interrupted_admission, tries
from tests.conformance.steering import Crew, assert_all_contributed
from tests.harness.cluster import Cluster


@pytest.mark.parametrize("count", [1, 3])
def test_r13_who_waits_is_admitted_at_one_safe_point(count: int) -> None:
    with Cluster(founders=2) as cluster:
        crew = Crew(cluster)
        crew.found(2)
        crew.start("admit", until=False)
        assert [answer["changed"] for answer in crew.done()] == [False, False]
        crew.reduce(times=5, lane="old")
        joiners = crew.waiting(count)
        crew.start("admit", until=True)
        assert [answer["changed"] for answer in crew.done()] == [True, True]
        crew.taken(joiners)
        assert crew.ids() == list(range(1, 3 + count))
        assert [crew.joined[process]["founder"] for process in crew.members] == [True, True] + [False] * count
        # Joiners take part in what comes next; every member sees the same membership.
        crew.start("admit", until=False)
        assert {tuple(answer["members"]) for answer in crew.done()} == {tuple(crew.ids())}
        for lane in ("old", "new"):
            assert all(answer["contributors"] == crew.ids() for answer in crew.reduce(lane=lane))
        for answer in crew.lose(0):
            assert answer["contributors"] == crew.ids()
        crew.leave()


@pytest.mark.parametrize("event", ["fenced", "epoch", "ready"])
@pytest.mark.parametrize("who", ["a member", "the only joiner", "one of two joiners"])
def test_r13_admission_races_with_a_death(who: str, event: str) -> None:
    with Cluster(founders=3) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        joiners = crew.waiting(0 if who == "the only joiner" else 1)
        if who == "a member":
            victim = crew.members.pop(1)
            crew.start("die on", [victim], event_name=event)
            crew.start("admit", [victim], until=True)
        else:
            victim = cluster.peer(dies_joining, event_name=event)
            cluster.await_status(lambda status: status.waiting == len(joiners) + 1)
        crew.start("admit", until=who != "the only joiner")
        crew.buried(victim)
        # Those who stood at the safe point agree on whether anything changed. A joiner that died on "ready" was in.
        answers = crew.done()
        changed = {answer["changed"] for answer in answers}
        assert len(changed) == 1, answers
        crew.taken(joiners)
        for answer in crew.reduce():
            assert answer["contributors"] == crew.ids()
            assert answer["members"] == crew.ids()
        crew.leave()


def test_r13_who_is_interrupted_at_the_safe_point_has_departed() -> None:
    with Cluster(founders=3) as cluster:
        joined = cluster.peers(interrupted_admission, 3)
        members = sorted(joined, key=lambda process: process.expect("rank")["rank"])
        joiner = cluster.peer(interrupted_admission)
        cluster.await_status(lambda status: status.waiting == 1)
        for process in members:
            process.tell("go")
        members[0].expect("admitting")
        cluster.coordinator.stop()
        members[0].tell("go")
        time.sleep(0.1)
        members[0].signal(signal.SIGINT)
        interrupted = members[0].result()
        cluster.coordinator.wake()
        assert "KeyboardInterrupt inside admit" in interrupted["said"]
        first, *others = [process.result()["members"] for process in (*members[1:], joiner)]
        assert others == [first] * 2
        assert first[:2] == [2, 3]
        assert len(first) == 3


def test_r13_who_dies_before_the_run_is_founded_is_forgotten() -> None:
    with Cluster(founders=2) as cluster:
        crew = Crew(cluster)
        crew.waiting(1)[0].kill()
        cluster.await_status(lambda status: status.waiting == 0)
        crew.found(2)
        assert crew.ids() == [2, 3]
        assert_all_contributed(crew.reduce(), crew)
        crew.leave()


def test_r13_who_dies_while_it_waits_is_forgotten() -> None:
    with Cluster(founders=2) as cluster:
        crew = Crew(cluster)
        crew.found(2)
        crew.waiting(1)[0].kill()
        cluster.await_status(lambda status: status.waiting == 0)
        crew.start("admit", until=False)
        assert [answer["changed"] for answer in crew.done()] == [False, False]
        assert_all_contributed(crew.reduce(), crew)
        crew.leave()


def test_r13_who_leaves_is_a_loss_with_notice() -> None:
    with Cluster(founders=3) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        leaver = crew.members.pop(1)
        crew.start("leave", [leaver])
        leaver.result()
        for answer in crew.reduce():
            assert answer["contributors"] == [1, 3]
        crew.leave()


def test_r13_when_the_last_has_left_others_found_the_run_anew() -> None:
    with Cluster(founders=2) as cluster:
        crew = Crew(cluster)
        crew.found(2)
        crew.leave()
        # Also when all die without notice.
        crew.found(2)
        assert crew.ids() == [3, 4], "member ids are never used again"
        assert all(joined["founder"] for joined in crew.joined.values())
        before, _, after, _ = [joined["epoch"] for joined in crew.joined.values()]
        assert before < after, "epoch numbers never go back"
        for answer in crew.reduce():
            assert answer["contributors"] == crew.ids()
        # When all die without notice there is no state that a run could be founded on.
        for process in crew.members:
            process.kill()
        cluster.await_status(lambda status: not status.members)
        result = cluster.run(tries, 1)[0]
        assert result["member"] == 5
        assert not result["founder"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quorum": True}, "1 of 2 members are left and `quorum` asks for more than half"),
        ({"min_members": 2}, "1 members are left and `min_members` is 2"),
    ],
)
def test_r13_too_few_members_end_the_run(options: dict[str, Any], said: str) -> None:
    with Cluster(founders=3, **options) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        assert [answer["contributors"] for answer in crew.lose(0)] == [[2, 3]] * 2
        answers = crew.lose(1, "begin")
        assert [answer["error"] for answer in answers] == ["QuorumLost"]
        assert said in answers[0]["message"]
        crew.members[0].result()


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"token": "wrong"}, "JoinRefused", "wrong token"),
        ({"run": "other"}, "JoinRefused", "serves run 'test', not 'other'"),
        ({"version": 9}, "JoinRefused", "install the same release"),
        ({"transport": "sockets"}, "JoinRefused", "this run uses transport 'gloo', the peer wants 'sockets'"),
        ({"transport": "pigeon"}, "OptionError", "unknown transport 'pigeon'"),
        ({"join_timeout": 0.4}, "CoordinatorUnreachable", "no epoch took this peer in within 0.4 s"),
    ],
)
def test_r13_who_does_not_fit_is_told_why(how: dict[str, Any], error: str, said: str) -> None:
    with Cluster(founders=1, transport="gloo") as cluster:
        crew = Crew(cluster)
        crew.found(1)
        result = cluster.run(tries, 1, **how)[0]
        assert result["error"] == error
        assert said in result["message"]
        crew.start("reduce", times=1)
        assert crew.done()[0]["contributors"] == [1]
        crew.leave()


def test_r13_no_coordinator_is_noticed_in_time() -> None:
    with Cluster(founders=1) as cluster:
        cluster.coordinator.kill()
        result = cluster.run(tries, 1, join_timeout=0.5)[0]
        assert result["error"] == "CoordinatorUnreachable"
        assert f"no coordinator at 127.0.0.1:{cluster.port} within 0.5 s" in result["message"]
