"""Simulated times: closed forms, examples worked out by hand, and what must hold on any network."""

import itertools
import math
import random

import numpy as np
import pytest

from collectives import choice, topology
from collectives.algorithms import dissemination
from collectives.busbw import bus_factor
from collectives.crossing import Intervals, forget, reserve
from collectives.errors import UsageError
from collectives.readiness import MOST
from collectives.schedule import Schedule, Step
from collectives.simulate import Timing, simulate
from collectives.topology import Link, Topology

ALPHA, BETA = 1e-3, 1e6
LINK = Link(ALPHA, BETA)
WORLDS = (2, 3, 4, 8)
NETWORKS = {
    "flat": lambda world: topology.flat(world, LINK),
    "mesh": lambda world: topology.mesh(world, LINK),
    "ring": lambda world: topology.ring(world, LINK),
    "hosts": lambda world: topology.hosts(-(-world // 2), 2, LINK.scaled(4), LINK),
}
CASES = [(kind, name) for kind in choice.kinds() for name in choice.names(kind)]


def built(kind: str, name: str, world: int, size: int = 12_000) -> Schedule:
    """A schedule of one-byte elements."""
    return choice.build(kind, name, world, size * world if kind == "all_to_all" else size)


def timed(schedule: Schedule, network: Topology, exact: bool | None = None, segment: int = 10**9) -> Timing:
    return simulate(schedule, network, segment_bytes=segment, itemsize=1, exact=exact)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_the_ring_takes_its_closed_form(world: int, exact: bool) -> None:
    size = 24_000
    expected = 2 * (world - 1) * (ALPHA + size / world / BETA)
    for network in (topology.flat(world, LINK), topology.mesh(world, LINK), topology.ring(world, LINK)):
        assert timed(choice.build("all_reduce", "ring", world, size), network, exact).time == pytest.approx(expected)


@pytest.mark.parametrize("exact", [True, False])
def test_doubling_and_halving_take_their_closed_forms(exact: bool) -> None:
    size, network = 16_000, topology.flat(8, LINK)
    doubling = timed(choice.build("all_reduce", "doubling", 8, size), network, exact)
    assert doubling.time == pytest.approx(3 * (ALPHA + size / BETA))
    halving = timed(choice.build("all_reduce", "halving_doubling", 8, size), network, exact)
    assert halving.time == pytest.approx(2 * (3 * ALPHA + 7 / 8 * size / BETA))


@pytest.mark.parametrize("exact", [True, False])
def test_a_chain_passes_segments_on_as_they_come(exact: bool) -> None:
    world, size, segment = 5, 40 * 1024, 4 * 1024
    timing = timed(choice.build("broadcast", "ring", world, size), topology.ring(world, LINK), exact, segment)
    assert timing.time == pytest.approx((size + (world - 2) * segment) / BETA + (world - 1) * ALPHA)


@pytest.mark.parametrize("exact", [True, False])
def test_two_senders_share_what_both_need(exact: bool) -> None:
    """Ranks 0 and 1 send 1000 bytes each to rank 2: its port in takes 2 ms, and one of them is done after 1 ms."""
    held = (((0, 1000),), ((1000, 2000),), ())
    rows = [(0, 2, 0, 1000, False), (1, 2, 1000, 2000, False)]
    schedule = Schedule.from_steps("exchange", "test", 3, 2000, [Step.of(rows)], held, ((), (), ((0, 2000),)))
    timing = timed(schedule, topology.flat(3, LINK), exact)
    assert timing.time == pytest.approx(2e-3 + ALPHA)
    assert sorted(timing.finish[:2]) == pytest.approx([1e-3, 1e-3])
    assert timing.bottleneck == "rank 2 in"
    assert timing.port_busy.max() == pytest.approx(2e-3)
    assert timed(schedule, topology.mesh(3, LINK), exact).time == pytest.approx(1e-3 + ALPHA)


@pytest.mark.parametrize("exact", [True, False])
def test_the_slowest_link_of_a_route_sets_the_pace(exact: bool) -> None:
    """2 ms of latency up and down besides the ranks' own, and the bytes once, not once a link: cut-through."""
    network = topology.hosts(2, 1, Link(1e-3, 4e6), Link(2e-3, 1e6))
    schedule = choice.build("broadcast", "flat", 2, 5000)
    assert timed(schedule, network, exact).time == pytest.approx(6e-3 + 5e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_reductions_take_their_time(exact: bool) -> None:
    schedule = choice.build("all_reduce", "doubling", 2, 4000)
    timing = simulate(schedule, topology.mesh(2, LINK), itemsize=1, reduce_rate=2e6, exact=exact)
    assert timing.time == pytest.approx(ALPHA + 4e-3 + 2e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_a_barrier_costs_latency_alone(exact: bool) -> None:
    timing = timed(dissemination.barrier(5), topology.flat(5, LINK), exact)
    assert timing.time == pytest.approx(3 * ALPHA)
    assert (timing.algbw, timing.bottleneck, timing.busiest) == (0, "none", None)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("exact", [True, False])
def test_no_time_is_less_than_its_bytes_need(kind: str, name: str, exact: bool) -> None:
    for world, (_, make) in itertools.product(WORLDS, NETWORKS.items()):
        network = make(world)
        timing = timed(built(kind, name, world), network, exact, 4096)
        assert timing.time >= (timing.port_bytes / network.bandwidth).max() * (1 - 1e-9)
        assert timing.time >= ALPHA / 2
        assert math.isfinite(timing.time)
        assert timing.finish.max() == timing.time


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_both_ways_move_the_same_bytes_over_the_same_links(kind: str, name: str) -> None:
    for world, (_, make) in itertools.product(WORLDS, NETWORKS.items()):
        schedule = built(kind, name, world)
        one, other = (timed(schedule, make(world), exact, 4096) for exact in (True, False))
        assert one.port_bytes == pytest.approx(other.port_bytes)
        assert one.nbytes == other.nbytes


@pytest.mark.parametrize("name", choice.names("all_reduce"))
def test_both_ways_agree_where_no_port_is_shared(name: str) -> None:
    """Within the half that segments in unlike order and waits for outgoing memory can make."""
    for world in WORLDS:
        schedule = built("all_reduce", name, world)
        one, other = (timed(schedule, topology.mesh(world, LINK), exact, 4096).time for exact in (True, False))
        assert other == pytest.approx(one, rel=0.5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_more_bytes_and_slower_links_never_take_less_time_step_by_step(kind: str, name: str) -> None:
    for world in WORLDS:
        small, large = built(kind, name, world, 6_720), built(kind, name, world, 67_200)
        fast, slow = topology.flat(world, LINK), topology.flat(world, Link(2 * ALPHA, BETA / 2))
        assert timed(small, fast, False).time <= timed(large, fast, False).time
        assert timed(small, slow, False).time == pytest.approx(2 * timed(small, fast, False).time)


def test_a_thousand_ranks_step_by_step() -> None:
    world, size = 1024, 2**28
    timing = simulate(choice.build("all_reduce", "ring", world, size // 4), topology.flat(world, Link(1e-6, 1e9)))
    assert not timing.exact
    assert timing.time == pytest.approx(2 * (world - 1) * (1e-6 + size / world / 1e9))
    assert timing.busbw == pytest.approx(timing.algbw * bus_factor("all_reduce", world))
    assert timing.port_bytes == pytest.approx(np.full(2 * world, size * 2 * (world - 1) / world))


def test_bus_factors_are_those_of_nccl_tests() -> None:
    factors = {kind: bus_factor(kind, 4) for kind in ("all_reduce", "all_gather", "gather", "broadcast")}
    assert factors == {"all_reduce": 1.5, "all_gather": 0.75, "gather": 0.75, "broadcast": 1.0}


def test_what_cannot_be_simulated_is_refused() -> None:
    schedule = choice.build("all_reduce", "ring", 4, 100)
    with pytest.raises(UsageError, match="has 3 ranks"):
        simulate(schedule, topology.flat(3, LINK))
    for wrong in ({"segment_bytes": 0}, {"itemsize": 0}, {"reduce_rate": 0.0}):
        with pytest.raises(UsageError, match="positive"):
            simulate(schedule, topology.flat(4, LINK), **wrong)


def test_more_ranges_than_memory_allows_are_refused() -> None:
    world = 1000
    rows = [(rank, (rank + 1) % world, at, at + 1, False) for rank in range(world) for at in range(rank, 2**17, world)]
    one = Step.of(rows)
    whole = (((0, 2**17),),) * world
    schedule = Schedule.from_steps("exchange", "test", world, 2**17, [one], whole, whole)
    assert 2**17 * world > MOST
    with pytest.raises(UsageError, match="fewer ranks"):
        simulate(schedule, topology.flat(world, LINK), exact=False)


def test_a_port_takes_messages_where_it_is_free() -> None:
    """Against a port of whole seconds, one by one."""
    draw = random.Random(3)
    for _ in range(300):
        taken: Intervals = []
        seconds = np.zeros(300, np.bool_)
        for _ in range(25):
            head, need = draw.randrange(120), draw.randrange(6)
            free = np.flatnonzero(~seconds[head:]) + head
            expected = (free[0], free[need - 1] + 1) if need else (free[0], free[0])
            assert reserve(taken, float(head), float(need)) == expected
            seconds[free[:need]] = True
            edges = np.flatnonzero(np.diff(np.concatenate([[False], seconds, [False]]).astype(int)))
            assert taken == list(zip(edges[::2], edges[1::2], strict=True))
        forget(taken, 60.0)
        assert all(end >= 60 for _, end in taken)
