"""Costs of placement changes: the table of the SBP paper, and the closed form against an enumeration of cells."""

import itertools
import math
import random

import pytest

from collectives.errors import UsageError
from parallel.boxing import boxing
from parallel.cells import cells, transfers
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Split
from tests.parallel.layouts import GRIDS, mesh_of

S0, S1, B, P = Split(0), Split(1), Broadcast(), Partial()
KINDS: list[Placement] = [S0, S1, B, P]
MORE: list[Placement] = [*KINDS, Partial("prod")]
SHAPE = (24, 60)
T = math.prod(SHAPE)


@pytest.mark.parametrize("p", [2, 3, 4, 6])
def test_one_axis_costs_what_the_table_of_the_paper_says(p: int) -> None:
    mesh = Mesh.of(x=p)
    table: dict[tuple[Placement, Placement], tuple[str, float, int]] = {
        (S0, B): ("all_gather", (p - 1) * T, 1),
        (P, B): ("all_reduce", 2 * (p - 1) * T, 2),
        (P, S1): ("reduce_scatter", (p - 1) * T, 1),
        (S0, S1): ("all_to_all", (p - 1) / p * T, 1),
        (B, S0): ("local", 0, 0),
        (B, P): ("local", 0, 0),
        (S0, P): ("local", 0, 0),
        (S0, S0): ("none", 0, 0),
        (P, P): ("none", 0, 0),
    }
    for (before, after), expected in table.items():
        found = boxing(Layout(mesh, (before,)), Layout(mesh, (after,)), SHAPE)
        assert (found.kind, found.elements, found.steps) == expected
        assert found.axes == (("x",) if found.elements else ())
        assert found.launches == bool(found.elements)


@pytest.mark.parametrize(("p", "q"), [(2, 3), (4, 4), (3, 1), (1, 2)])
def test_disjoint_ranks_cost_what_the_table_of_the_paper_says(p: int, q: int) -> None:
    before, after = Mesh.of(x=p), Mesh((("y", q),), tuple(range(p, p + q)))
    table: dict[tuple[Placement, Placement], int] = {
        (S0, S0): T,
        (S0, S1): T,
        (S0, B): q * T,
        (S0, P): T,
        (B, S0): T,
        (B, B): q * T,
        (B, P): T,
        (P, S0): p * T,
        (P, B): (p + q - 1) * T,
        (P, P): p * T,
    }
    for (a, b), elements in table.items():
        found = boxing(Layout(before, (a,)), Layout(after, (b,)), SHAPE)
        assert (found.elements, found.kind) == (elements, "exchange")


def test_partial_values_of_one_kind_become_those_of_another() -> None:
    """Replicas are maxima of themselves; a product is one number and ones."""
    mesh = Mesh.of(x=3)
    most, product, whole = (Layout(mesh, (kind,)) for kind in (Partial("max"), Partial("prod"), B))
    sums = Layout(mesh, (P,))
    assert boxing(sums, most, SHAPE) == boxing(sums, whole, SHAPE)
    assert boxing(Layout(mesh, (S0,)), most, SHAPE) == boxing(Layout(mesh, (S0,)), whole, SHAPE)
    assert boxing(whole, most, SHAPE).kind == "local"
    assert boxing(most, most, SHAPE).kind == "none"
    found = boxing(sums, product, SHAPE)
    assert (found.kind, found.axes, found.elements, found.steps) == ("reduce", ("x",), 2 * T, 1)


def test_the_closed_form_counts_what_an_enumeration_does() -> None:
    chance, counted = random.Random(7), 0
    for grid in GRIDS:
        placed = [p for p in itertools.product(MORE, repeat=len(grid)) if not {P, MORE[-1]} <= set(p)]
        layouts = [Layout(mesh_of(*grid), p) for p in placed]
        pairs = list(itertools.permutations(layouts, 2))
        for a, b in chance.sample(pairs, min(len(pairs), 150)):
            for shape in ((4, 6), (5, 3), (1, 7)):
                found = boxing(a, b, shape)
                assert (found.elements, found.steps) == transfers(cells(a, b, shape)), f"{a} to {b} of {shape}"
                assert bool(found.axes) == bool(found.elements)
                counted += found.elements > 0
    assert counted > 1000


def test_a_second_axis_is_not_paid_for_twice() -> None:
    """Every element is sent to each of the three that lack it, not gathered along one axis and then the other."""
    mesh = Mesh.of(x=2, y=2)
    found = boxing(Layout(mesh, (P, P)), Layout(mesh, (B, B)), SHAPE)
    assert (found.kind, found.axes, found.elements) == ("all_reduce", ("x", "y"), 6 * T)
    found = boxing(Layout(mesh, (B, S0)), Layout(mesh, (S0, S0)), SHAPE)
    assert (found.kind, found.axes, found.elements) == ("all_to_all", ("y",), T // 2)
    found = boxing(Layout(mesh, (P, S0)), Layout(mesh, (B, B)), SHAPE)
    assert (found.kind, found.elements) == ("exchange", 4 * T)


def test_flat_shards_cost_the_elements_that_change_hands() -> None:
    mesh = Mesh.of(x=3)
    flat = Layout(mesh, (Flat(),))
    assert boxing(flat, Layout(mesh, (B,)), (4, 5)).elements == 2 * 20
    assert boxing(Layout(mesh, (P,)), flat, (4, 5)).kind == "reduce_scatter"
    assert boxing(flat, Layout(mesh, (S0,)), (4, 5)).elements == 3 + 1  # rows end at 10, 15; ranges at 7, 14


def test_what_cannot_be_done_is_refused() -> None:
    mesh = Mesh.of(x=2, y=2)
    with pytest.raises(UsageError, match="several ways; go by way of B"):
        boxing(Layout(mesh, (P, Partial("max"))), Layout(mesh, (B, B)), SHAPE)
    with pytest.raises(UsageError, match="needs a dimension 2"):
        boxing(Layout(mesh, (Split(2), B)), Layout(mesh, (B, B)), SHAPE)
