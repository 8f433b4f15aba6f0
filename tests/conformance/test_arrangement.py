"""Measured links, and rings that follow them: alike on every member, after losses and with members that come."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.arranged import arranged
from tests.conformance.transports import TRANSPORTS
from tests.harness.cluster import Cluster, Process

FAST = {"latency": 1e-3, "bandwidth": 50e6}
SLOW = {"latency": 10e-3, "bandwidth": 2e6}


class Crew:
    """Members in the order of their ranks, steered by the test."""

    def __init__(self, cluster: Cluster, size: int) -> None:
        self.cluster = cluster
        joining = cluster.peers(arranged, size)
        self.members: list[Process] = sorted(joining, key=lambda process: process.expect("joined")["rank"])

    def do(self, what: str, **given: Any) -> list[dict[str, Any]]:
        """Have everybody do it; their answers by rank."""
        for member in self.members:
            member.tell("do", what=what, **given)
        return [member.expect("done") for member in self.members]

    def agreed(self, what: str, *facts: str) -> list[Any]:
        """Have everybody do it; what all said alike about these facts."""
        answers = self.do(what)
        for answer in answers:
            assert all(answer[fact] == answers[0][fact] for fact in facts), answers
        return [answers[0][fact] for fact in facts]

    def reduces_along(self, *ring: int) -> None:
        """Whether an all-reduce is right, and each member sends data to the next one of the ring alone."""
        answers = self.do("reduce")
        assert all(answer["right"] for answer in answers)
        assert len({answer["bits"] for answer in answers}) == 1
        for answer in answers:
            assert answer["contributors"] == sorted(ring)
        next_of = dict(zip(ring, (*ring[1:], ring[0]), strict=True))
        members = answers[0]["members"]
        assert [answer["to"] for answer in answers] == [[next_of[member]] for member in members]

    def leave(self) -> None:
        for member in self.members:
            member.tell("do", what="leave")
        for member in self.members:
            member.result()


def mesh_without(folder: Path, ranks: int, *slow: tuple[int, int]) -> str:
    """A full mesh in which the links between these ranks are slow, both ways."""
    ports = [f"link {a}>{b}" for pair in slow for a, b in (pair, pair[::-1])]
    file = folder / "mesh.json"
    file.write_text(
        json.dumps({"kind": "mesh", "ranks": ranks, "link": FAST, "exceptions": dict.fromkeys(ports, SLOW)})
    )
    return str(file)


@pytest.fixture
def slow_square(tmp_path: Path) -> Iterator[Crew]:
    """Four members (ids 1 to 4) of which 1-2 and 3-4 must not be neighbours: the ring is 1 3 2 4 or its reverse."""
    topology = mesh_without(tmp_path, 5, (0, 1), (2, 3))
    with Cluster(founders=4, transport="emulated:sockets", topology=topology) as cluster:
        crew = Crew(cluster, 4)
        yield crew
        crew.leave()


def test_a_ring_avoids_slow_links(slow_square: Crew) -> None:
    slow_square.reduces_along(1, 2, 3, 4)
    ring, latency, bandwidth, hosts = slow_square.agreed("optimize", "ring", "latency", "bandwidth", "hosts")
    assert ring in ([1, 3, 2, 4], [1, 4, 2, 3])
    for a in range(4):
        for b in range(a):
            slow = (b, a) in ((0, 1), (2, 3))
            assert latency[a][b] == latency[b][a]
            assert (latency[a][b] > 5e-3) == slow
            assert (bandwidth[a][b] < 5e6) == (bandwidth[b][a] < 5e6) == slow
    assert hosts is None
    slow_square.reduces_along(*ring)


def test_survivors_keep_the_order(slow_square: Crew) -> None:
    (ring,) = slow_square.agreed("optimize", "ring")
    victim = slow_square.members.pop(1)
    victim.tell("do", what="die at", point="transfer", kind="all_reduce")
    victim.expect("done")
    victim.tell("do", what="reduce")
    answers = slow_square.do("reduce")
    victim.expect("fired")
    victim.ending()
    assert all(answer["right"] and answer["contributors"] == [1, 3, 4] for answer in answers)
    slow_square.reduces_along(*(member for member in ring if member != 2))


def test_members_lost_while_links_are_measured_are_left_out(slow_square: Crew) -> None:
    victim = slow_square.members.pop(3)
    victim.tell("do", what="die at", point="transfer", kind="exchange")
    victim.expect("done")
    victim.tell("do", what="optimize")
    measured, _ = slow_square.agreed("optimize", "measured", "latency")
    victim.expect("fired")
    victim.ending()
    assert measured == [1, 2, 3]
    slow_square.do("reduce")


def test_a_new_member_puts_all_back_to_the_order_of_ranks(slow_square: Crew) -> None:
    slow_square.do("optimize")
    joiner = slow_square.cluster.peer(arranged)
    slow_square.cluster.await_status(lambda status: status.waiting == 1)
    slow_square.do("admit")
    joiner.expect("joined")
    slow_square.members.append(joiner)
    slow_square.reduces_along(1, 2, 3, 4, 5)
    (ring,) = slow_square.agreed("optimize", "ring")
    assert {frozenset(pair) for pair in zip(ring, (*ring[1:], ring[0]), strict=True)}.isdisjoint(
        {frozenset((1, 2)), frozenset((3, 4))}
    )
    slow_square.reduces_along(*ring)
    slow_square.members.remove(joiner)
    joiner.tell("do", what="leave")
    joiner.result()
    slow_square.do("reduce")
    slow_square.reduces_along(*(member for member in ring if member != 5))


def test_members_that_are_near_to_each_other_count_as_a_host(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    inside, uplink = {"latency": 1e-4, "bandwidth": 1e9}, {"latency": 2e-2, "bandwidth": 1e8}
    file.write_text(json.dumps({"kind": "hosts", "hosts": 2, "ranks_per_host": 2, "inside": inside, "uplink": uplink}))
    with Cluster(founders=4, transport="emulated:sockets", topology=str(file)) as cluster:
        crew = Crew(cluster, 4)
        (hosts,) = crew.agreed("optimize", "hosts")
        assert hosts == [0, 0, 1, 1]
        assert crew.agreed("reduce", "hosts", "right") == [[0, 0, 1, 1], True]
        crew.leave()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_links_are_measured_over_every_transport(transport: str, size: int) -> None:
    with Cluster(founders=size, transport=transport) as cluster:
        crew = Crew(cluster, size)
        ring, measured, latency, bandwidth = crew.agreed("optimize", "ring", "measured", "latency", "bandwidth")
        assert sorted(ring) == measured == list(range(1, size + 1))
        for a in range(size):
            assert all((latency[a][b] > 0) == (a != b) and bandwidth[a][b] > 0 for b in range(size))
        assert all(crew.agreed("reduce", "right", "bits"))
        crew.leave()
