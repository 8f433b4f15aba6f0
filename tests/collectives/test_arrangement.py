"""Tours, tournaments and what follows from a measurement, without a network."""

import itertools
import random

import pytest

from collectives.arrangement import Measurement, arrange
from collectives.probing import BULKS, PINGS, results, rounds, tournament
from collectives.tour import EXACT, Costs, best_tour


def random_costs(world: int, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[0.0 if a == b else draw.choice((1.0, 2.0, 5.0, 5.5, 9.0)) for b in range(world)] for a in range(world)]


def price(costs: Costs, order: tuple[int, ...]) -> tuple[float, float]:
    links = [costs[a][b] for a, b in itertools.pairwise((*order, order[0]))]
    return max(links), sum(links)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 7])
def test_small_tours_are_the_best_of_all(world: int, seed: int) -> None:
    costs = random_costs(world, seed)
    tour = best_tour(costs)
    assert tour.exact
    best = min((price(costs, (0, *rest)), (0, *rest)) for rest in itertools.permutations(range(1, world)))
    assert (tour.slowest, tour.total) == best[0]
    assert tour.order == best[1]  # of equal ones the first: the same on every member


@pytest.mark.parametrize("world", [EXACT + 1, 24, 60])
def test_long_tours_keep_to_their_bounds_and_find_a_hidden_ring(world: int) -> None:
    hidden = [0, *random.Random(world).sample(range(1, world), world - 1)]
    fast = {frozenset(pair) for pair in zip(hidden, [*hidden[1:], 0], strict=True)}
    costs = [[1.0 if frozenset((a, b)) in fast else 3.0 for b in range(world)] for a in range(world)]
    tour = best_tour(costs)
    assert sorted(tour.order) == list(range(world))
    assert tour.order[0] == 0
    assert not tour.exact
    assert tour.least_slowest <= 1.0
    assert tour.least_total <= world
    assert (tour.slowest, tour.total) == price(costs, tour.order)
    assert tour.total <= 1.2 * world


@pytest.mark.parametrize("seed", range(3))
def test_long_tours_are_no_worse_than_the_order_of_ranks(seed: int) -> None:
    costs = random_costs(14, seed)
    tour = best_tour(costs)
    assert (tour.slowest, tour.total) <= price(costs, tuple(range(14)))
    assert tour.least_slowest <= tour.slowest
    assert tour.least_total <= tour.total


def test_a_tour_of_one() -> None:
    assert best_tour([[0.0]]).order == (0,)


@pytest.mark.parametrize("world", range(1, 12))
def test_every_pair_meets_once(world: int) -> None:
    made = rounds(world)
    assert sorted(itertools.chain(*made)) == list(itertools.combinations(range(world), 2))
    for pairs in made:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    assert len(tournament(world, 10)) == sum(1 + 3 * PINGS + 3 * BULKS + 4 * BULKS for _ in made)


def test_times_are_read_as_latency_and_bandwidth() -> None:
    read = [7.0]  # of an attempt that was given up
    clock = 100.0
    for trip in (0.0, 0.9, 0.001, *[0.02] * (PINGS - 2), 1.02, 2.02, 0.27, 0.52):
        clock += trip
        read.append(clock)
    (probe,) = results(2, 0, 1000, read)
    assert probe.peer == 1
    assert probe.latency == pytest.approx(0.01)
    assert probe.out == pytest.approx(1000)
    assert probe.back == pytest.approx(4000)
    assert results(2, 1, 1000, [1.0] * BULKS) == []


def measured(latency: list[list[float]], addresses: tuple[str, ...] = ()) -> Measurement:
    world = len(latency)
    rates = ((1e9,) * world,) * world
    return Measurement(
        tuple(range(11, 11 + world)), addresses or ("a",) * world, tuple(map(tuple, latency)), rates, 1000
    )


def blocks(world: int, near: float, far: float, size: int) -> list[list[float]]:
    return [[0.0 if a == b else near if a // size == b // size else far for b in range(world)] for a in range(world)]


def test_hosts_are_told_by_address_else_by_latency() -> None:
    assert arrange(measured(blocks(4, 1e-5, 1e-3, 2))).hosts == (0, 0, 1, 1)
    assert arrange(measured(blocks(4, 1e-5, 1e-3, 2), ("x", "y", "x", "y"))).hosts == (0, 1, 0, 1)
    assert arrange(measured(blocks(4, 1e-5, 2e-5, 2))).hosts is None  # no gap that means anything
    ambiguous = blocks(4, 1e-5, 1e-3, 2)
    ambiguous[0][2] = ambiguous[2][0] = 1e-5
    assert arrange(measured(ambiguous)).hosts is None


def test_an_arrangement_means_something_where_all_were_measured() -> None:
    slow = blocks(4, 1e-2, 1e-4, 2)  # neighbours are far from each other
    found = arrange(measured(slow))
    assert found.ring == (11, 13, 12, 14)
    assert found.order_of((11, 12, 13, 14)) == (0, 2, 1, 3)
    assert found.order_of((12, 13, 14)) == (0, 2, 1)
    assert found.order_of((11, 13)) is None  # that is the order of ranks
    assert found.order_of((11, 12, 13, 14, 15)) is None
    hosts = arrange(measured(blocks(4, 1e-5, 1e-3, 2)))
    assert hosts.hosts_of((12, 13, 14)) == (0, 1, 1)
    assert hosts.hosts_of((13, 14)) is None
    assert hosts.hosts_of((11, 15)) is None
    assert arrange(measured([[0.0]])).order_of((11,)) is None
