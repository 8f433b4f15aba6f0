"""Plans of graphs drawn at random cost what the best costs that trying everything finds."""

import random

import msgspec
import pytest

from parallel.cost import Costs
from parallel.layout import Mesh
from parallel.machine import CPU
from parallel.planner import NoPlan, plan
from tests.parallel.brute import Brute
from tests.parallel.random_graphs import draw_graph

SLOW = msgspec.structs.replace(CPU, launch=6e-5, flops=2e7, bandwidth=2e8, kernel=0.0)
"""Ranks so slow that even tiny operations are worth sharding."""
TIES = 2e-6
"""Of a time: what ties are worth, and the solver's tolerance."""


@pytest.mark.parametrize("seed", range(12))
def test_a_drawn_graph_is_planned_as_well_as_by_trying_everything(seed: int) -> None:
    chance = random.Random(seed)
    mesh = (Mesh.of(x=2), Mesh.of(x=3), Mesh.of(x=4), Mesh.of(a=2, b=2))[seed % 4]
    graph = draw_graph(chance, chance.randint(4, 8) if len(mesh.axes) == 1 else chance.randint(2, 4))
    found = plan(graph, mesh, machine=SLOW).figures
    assert found is not None
    brute = Brute(graph, Costs(mesh, SLOW), found.time * (1 + TIES))
    assert brute.best() == pytest.approx(found.time, rel=TIES)
    assert brute.tried > 0


@pytest.mark.parametrize("seed", range(6))
def test_and_so_it_is_within_a_memory_limit(seed: int) -> None:
    chance = random.Random(seed)
    mesh = (Mesh.of(x=2), Mesh.of(x=3))[seed % 2]
    graph = draw_graph(chance, chance.randint(2, 4))
    free = plan(graph, mesh, machine=SLOW).figures
    assert free is not None
    memory = free.memory * chance.choice((0.9, 0.8, 0.7))
    try:
        figures = plan(graph, mesh, memory, machine=SLOW).figures
    except NoPlan:
        assert Brute(graph, Costs(mesh, SLOW), 10 * free.time, memory).best() == float("inf")
        return
    assert figures is not None
    assert figures.memory <= memory
    assert Brute(graph, Costs(mesh, SLOW), figures.time * (1 + TIES), memory).best() == pytest.approx(
        figures.time, rel=TIES
    )
