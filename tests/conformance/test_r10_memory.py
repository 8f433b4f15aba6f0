"""Rule R10 and registered buffers: memory is read where it lies, by who may; nobody takes what its owner gave up."""

import pytest

from tests.conformance import memory
from tests.harness.cluster import Cluster
from tests.harness.residents import Residents


@pytest.mark.parametrize("transport", ["shm", "sockets"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_registered_buffers_are_as_good_as_others(transport: str, world: int) -> None:
    with Residents(world, transport=transport) as group:
        first, *others = group.run(memory.registered, mapped=transport == "shm")
    assert all(digests == first for digests in others)


@pytest.mark.parametrize("blind", [[1], [2, 3], [1, 2, 3]])
def test_r10_memory_that_a_peer_may_not_read_goes_through_registered_memory(blind: list[int]) -> None:
    with Cluster(founders=3, transport="shm") as cluster:
        answers = [process.result() for process in cluster.peers(memory.unreadable, 3, blind=blind)]
    assert all(answer["digests"] == answers[0]["digests"] for answer in answers)
    assert all(answer["grown"] < 2**20 for answer in answers), "copies were kept"
