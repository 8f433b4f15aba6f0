"""Nothing piles up while members come and go: no thread, no descriptor, no memory, in members and coordinator.

The short form makes 30 epochs. The long one makes 200, in about a minute:

    RINGHOLD_LONG=1 pytest tests/conformance/test_rebuilds.py
"""

import signal

import pytest

from tests.conformance.churn import holdings, newcomer, veteran
from tests.conformance.transports import LONG, TRANSPORTS
from tests.harness.cluster import Cluster

ROUNDS = 100 if LONG else 15
"""Each of two epochs: one that admits a peer, one that has lost it."""
SPAN = 5
"""The least of so many rounds is compared: how much a pool holds at the moment is a matter of chance."""
MOST_KIB = 20 * 1024
"""An all-reduce of 4 MB a round; were one buffer kept for each, that would be 40 MB between the two spans at least."""


@pytest.mark.timeout(600 if LONG else 120)
@pytest.mark.parametrize("transport", TRANSPORTS if LONG else ["gloo"])
def test_rebuilding_again_and_again_leaks_nothing(transport: str) -> None:
    with Cluster(founders=3, transport=transport) as cluster:
        veterans = cluster.peers(veteran, 3, rounds=ROUNDS)
        coordinator = []
        for _ in range(ROUNDS):
            for process in veterans:
                process.expect("round")
            coordinator.append(holdings(str(cluster.coordinator.pid)))
            victim = cluster.peer(newcomer)
            assert victim.ending().signal == signal.SIGKILL
            assert victim.said("fired")
            victim.end()
        stories = [process.result() for process in veterans]
        epoch = cluster.status().epoch
    assert epoch >= 2 * ROUNDS + 1
    for story in (*stories, coordinator):
        before, after = (
            {key: min(one[key] for one in rounds) for key in rounds[0]} for rounds in (story[:SPAN], story[-SPAN:])
        )
        assert after["threads"] <= before["threads"], story
        assert after["descriptors"] <= before["descriptors"], story
        assert after["memory"] <= before["memory"] + MOST_KIB, story
