"""Members that are on several hosts choose and run algorithms that know of it, all the same ones."""

import pytest

from tests.conformance.hosts import dwell
from tests.conformance.transports import TRANSPORTS
from tests.harness.cluster import Cluster


@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != "shm"])
def test_two_hosts(transport: str) -> None:
    with Cluster(founders=5, transport=transport) as cluster:
        members = cluster.peers(dwell, 3, address="127.0.0.1") + cluster.peers(dwell, 2, address="127.0.0.2")
        first, *others = [process.result() for process in members]
    assert first
    assert all(digests == first for digests in others)
