"""Training by plan in real processes, one killed between two steps: the numbers of one process, the bytes planned."""

import pytest

from tests.harness.cluster import Cluster
from tests.parallel import training_programs as programs


@pytest.mark.timeout(400)
def test_a_death_changes_no_number() -> None:
    with Cluster(transport="sockets", founders=3, heartbeat_timeout=60.0, join_timeout=300.0) as cluster:
        peers = cluster.peers(programs.train, 3)
        told = [peer.expect("sent", timeout=300.0) for peer in peers]
        step, copies = told[0]["planned"]
        assert step > 0
        assert copies > 0
        assert sum(each["sent"] for each in told) == step + copies
        ranked = sorted(peers, key=lambda peer: peer.expect("halfway", timeout=300.0)["rank"])
        ranked[1].kill()
        left = [ranked[0], ranked[2]]
        for peer in left:
            peer.tell("go")
        for result in (peer.result(timeout=180.0) for peer in left):
            assert result["size"] == 2
            assert result["copied"] > 0
            assert result["errors"] <= 1e-10
            assert result["state"] <= 1e-10
            assert result["tensors"] > 20
