"""Rule R12: the coordinator may die, be stopped, be started again; what members do meanwhile."""

import shutil
import time

from collectives.membership.protocol import Status
from tests.conformance.steering import Crew, assert_all_contributed
from tests.harness.cluster import Cluster


def all_connected(status: Status) -> bool:
    return all(member.state == "member" for member in status.members)


def test_r12_collectives_go_on_without_the_coordinator_and_a_loss_is_handled_after_its_restart() -> None:
    with Cluster(founders=3) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        cluster.coordinator.kill()
        answers = crew.reduce(times=50)
        assert_all_contributed(answers, crew)
        assert {answer["epoch"] for answer in answers} == {1}
        cluster.start_coordinator()
        cluster.await_status(all_connected)
        answers = crew.lose(1)
        assert_all_contributed(answers, crew)
        assert {answer["epoch"] for answer in answers} == {2}
        crew.leave()


def test_r12_members_that_need_the_coordinator_depart_after_its_timeout() -> None:
    with Cluster(founders=3, coordinator_timeout=1.0) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        cluster.coordinator.kill()
        for answer in crew.lose(0):
            assert answer["error"] == "CoordinatorUnreachable"
            assert "was away for 1 s" in answer["message"]
            assert answer["seconds"] >= 1.0
        for process in crew.members:
            process.result()


def test_r12_a_loss_without_coordinator_is_handled_when_it_is_back() -> None:
    with Cluster(founders=4, heartbeat=0.1, heartbeat_timeout=2.0) as cluster:
        crew = Crew(cluster)
        crew.found(4)
        cluster.coordinator.kill()
        victims = [crew.doom(0, "transfer"), crew.doom(1, "begin")]
        crew.start("reduce", [*crew.members, *victims], times=1)
        for victim in victims[:1]:
            crew.buried(victim)
        cluster.start_coordinator()
        if victims[1].expect("fired"):
            victims[1].ending()
        assert_all_contributed(crew.done(), crew)
        crew.leave()


def test_r12_a_coordinator_that_was_stopped_past_the_timeout_evicts_nobody() -> None:
    with Cluster(founders=3, heartbeat=0.1, heartbeat_timeout=2.0) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        cluster.coordinator.stop()
        stopped = time.monotonic()
        while time.monotonic() < stopped + 4.5:
            answers = crew.reduce(times=20)
            assert_all_contributed(answers, crew)
        cluster.coordinator.wake()
        assert_all_contributed(crew.reduce(), crew)
        status = cluster.await_status(all_connected)
        assert [member.member for member in status.members] == crew.ids()
        assert status.epoch == 1
        assert_all_contributed(crew.lose(2), crew)
        crew.leave()


def test_r12_the_coordinator_dies_while_it_handles_a_loss() -> None:
    with Cluster(founders=5, heartbeat=0.1, heartbeat_timeout=2.0) as cluster:
        crew = Crew(cluster)
        crew.found(5)
        epochs = [1]
        for trial in range(3):
            victim = crew.doom(trial % len(crew.members), "transfer")
            crew.start("reduce", [*crew.members, victim], times=1)
            crew.buried(victim)
            time.sleep(0.004 * trial)
            cluster.coordinator.kill()
            cluster.start_coordinator()
            answers = crew.done()
            assert_all_contributed(answers, crew)
            assert len({answer["epoch"] for answer in answers}) == 1
            epochs.append(answers[0]["epoch"])
        assert epochs == sorted(set(epochs)), "an epoch number was used twice"
        crew.leave()


def test_r12_one_journal_one_coordinator_and_never_an_old_one() -> None:
    with Cluster(founders=3) as cluster:
        coordinate = "tests.harness.coordinator:coordinate"
        crew = Crew(cluster)
        crew.found(3)
        again = {"port": 0, "new": False, "options": cluster.options}
        second = cluster.peer(coordinate, journal=str(cluster.journal), **again).ending()
        assert second.error == "JournalError"
        assert "another coordinator of this run is alive" in second.message
        old = cluster.folder / "old"
        shutil.copy(cluster.journal, old)
        assert_all_contributed(crew.lose(0), crew)
        cluster.coordinator.kill()
        stale = cluster.peer(coordinate, journal=str(old), **{**again, "port": cluster.port}).ending()
        assert stale.error == "JournalError"
        assert "this journal is old" in stale.message
        assert_all_contributed(crew.reduce(), crew)
        cluster.start_coordinator()
        cluster.await_status(all_connected)
        assert_all_contributed(crew.lose(0), crew)
        crew.leave()


def test_r12_when_all_members_are_silent_at_once_none_is_evicted() -> None:
    with Cluster(founders=3, heartbeat=0.1, heartbeat_timeout=1.5) as cluster:
        crew = Crew(cluster)
        crew.found(3)
        for process in crew.members:
            process.stop()
        time.sleep(3.0)
        for process in crew.members:
            process.wake()
        assert_all_contributed(crew.reduce(), crew)
        assert cluster.status().epoch == 1
        crew.leave()
