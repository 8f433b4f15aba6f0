"""Topologies: routes of each kind, links that differ, and files that are refused with a reason."""

from pathlib import Path

import numpy as np
import pytest

from collectives import topology
from collectives.errors import UsageError
from collectives.topology import NO_PORT, Link, Topology
from collectives.topology_file import load, parse

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "topologies").glob("*.json"))
FAST, SLOW = Link(1e-6, 1e10), Link(1e-5, 1e9)


def way(network: Topology, src: int, dst: int) -> list[str]:
    return [network.ports[port] for port in network.route(src, dst)]


def test_flat_has_a_port_out_and_a_port_in_for_each_rank() -> None:
    network = topology.flat(4, Link(2e-6, 1e9, 2e-7))
    assert way(network, 1, 3) == ["rank 1 out", "rank 3 in"]
    assert len(network.ports) == 8
    assert sum(network.link(port).latency for port in network.route(1, 3)) == pytest.approx(2e-6)
    assert network.hosts is None


def test_hosts_share_their_uplinks() -> None:
    network = topology.hosts(2, 3, FAST, SLOW)
    assert way(network, 0, 2) == ["rank 0 out", "rank 2 in"]
    assert way(network, 2, 3) == ["rank 2 out", "host 0 up", "host 1 down", "rank 3 in"]
    assert network.hosts == (0, 0, 0, 1, 1, 1)


def test_a_fat_tree_goes_no_higher_than_it_must() -> None:
    network = topology.fat_tree(2, 2, 2, FAST, SLOW, oversubscription=4)
    assert way(network, 0, 1) == ["rank 0 out", "rank 1 in"]
    assert way(network, 0, 2) == ["rank 0 out", "host 0 up", "host 1 down", "rank 2 in"]
    ends = ["rank 0 out", "host 0 up", "leaf 0 up", "leaf 1 down", "host 3 down", "rank 7 in"]
    assert way(network, 0, 7) == ends
    assert network.link(network.ports.index("leaf 0 up")).bandwidth == SLOW.bandwidth * 2 / 4


def test_a_ring_goes_the_shorter_way_round() -> None:
    network = topology.ring(5, SLOW)
    assert way(network, 4, 1) == ["link 4>0", "link 0>1"]
    assert way(network, 1, 4) == ["link 1>0", "link 0>4"]
    assert way(topology.ring(2, SLOW), 1, 0) == ["link 1>0"]


def test_a_mesh_shares_nothing() -> None:
    network = topology.mesh(3, SLOW)
    pairs = [(src, dst) for src in range(3) for dst in range(3) if src != dst]
    assert len({network.route(*pair) for pair in pairs}) == 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_join_all_ranks(path: Path) -> None:
    network = load(path)
    ranks = np.arange(network.ranks)
    routes = network.routes(ranks, (ranks + network.ranks // 2) % network.ranks)
    assert ((routes != NO_PORT).sum(axis=1) > 0).all()
    assert (routes < len(network.ports)).all()


def test_a_graph_takes_the_fewest_links() -> None:
    network = load(next(path for path in EXAMPLES if path.stem == "graph"))
    assert way(network, 0, 1) == ["link a>left", "link left>b"]
    assert way(network, 1, 3) == ["link b>left", "link left>right", "link right>d"]


def test_an_exception_replaces_one_port() -> None:
    network = parse(
        '{"kind": "flat", "ranks": 3, "seed": 7, "link": {"latency": 0, "bandwidth": 10},'
        ' "exceptions": {"rank 1 out": {"latency": 2, "bandwidth": 5}}}'
    )
    assert network.seed == 7
    assert network.link(network.ports.index("rank 1 out")) == Link(2, 5)
    assert network.link(network.ports.index("rank 0 out")) == Link(0, 10)


LINK = '{"latency": 1e-6, "bandwidth": 1e9}'
NAMED = '{"kind": "graph", "ranks": ["a", "b"], '


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "truncated"),
        ("[]", "object"),
        ('{"kind": "torus"}', "torus"),
        ('{"kind": "flat"}', "ranks"),
        ('{"kind": "flat", "ranks": "4", "link": ' + LINK + "}", "int"),
        ('{"kind": "flat", "ranks": 0, "link": ' + LINK + "}", "at least one rank"),
        ('{"kind": "flat", "ranks": 4, "speed": 1, "link": ' + LINK + "}", "speed"),
        ('{"kind": "flat", "ranks": 4, "link": {"latency": -1, "bandwidth": 1}}', "latency"),
        ('{"kind": "flat", "ranks": 4, "link": {"latency": 0, "bandwidth": 0}}', "bandwidth"),
        ('{"kind": "flat", "ranks": 4, "link": {"latency": 0, "bandwidth": 1, "loss": 1}}', "loss"),
        ('{"kind": "flat", "ranks": 4, "link": ' + LINK + ', "exceptions": {"rank 9 in": ' + LINK + "}}", "rank 9 in"),
        (NAMED + '"links": []}', "no links lead"),
        (NAMED + '"links": [{"from": "a", "to": "c", "link": ' + LINK + "}]}", "'c'"),
        (NAMED + '"links": [' + ", ".join(['{"from": "a", "to": "b", "link": ' + LINK + "}"] * 2) + "]}", "twice"),
        (NAMED + '"switches": ["a"], "links": []}', "names of their own"),
    ],
)
def test_what_cannot_be_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=r"^lab\.json: ") as caught:
        parse(text, "lab.json")
    assert why in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        load(tmp_path / "nowhere.json")


def test_ranks_beyond_the_topology_are_refused() -> None:
    with pytest.raises(UsageError, match="no rank 4"):
        topology.flat(4, SLOW).route(0, 4)
