"""Strangers at every port of a run: nobody is let in, nobody who belongs here is disturbed, no secret is logged."""

import pytest

from tests.conformance.crowded import reduce_until_told
from tests.harness.cluster import TOKEN, Cluster
from tests.harness.strangers import IDLE, Strangers


@pytest.mark.timeout(100)
def test_a_crowd_of_strangers_is_refused_and_disturbs_nobody() -> None:
    with Cluster(founders=3, heartbeat=0.1, op_timeout=30.0) as cluster:
        members = cluster.peers(reduce_until_told, 3)
        ports = [member.expect("joined")["port"] for member in members]
        with Strangers(cluster.port, ports, Cluster.RUN) as crowd:
            while len(crowd.done) < 7 or crowd.done["_stand_around"] < IDLE:
                crowd.look()
                for member in members:
                    member.expect("count")  # operations go on meanwhile
            newcomer = cluster.peer(reduce_until_told)  # and who belongs here gets in
            newcomer.expect("joined")
            newcomer.expect("count")
            crowd.look()
        assert not any(crowd.let_in.values()), crowd.let_in
        for process in (*members, newcomer):
            process.tell("end")
        results = [process.result() for process in (*members, newcomer)]
        assert [result["odd"] for result in results] == [0, 0, 0, 0]
        assert {result["epoch"] for result in results} == {2}  # only the newcomer changed the membership
        said = cluster.coordinator.log.read_text()
    assert "refused a connection" in said
    assert "wrong token: RINGHOLD_TOKEN must be the same" in said
    assert TOKEN not in said.replace("tests.harness", "").replace("harness/", "").replace("-harness", "")
