"""Layouts against numpy's own indexing: who holds which elements, and that nothing is missing or held too often."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.errors import UsageError
from collectives.region import Region, split
from parallel.layout import (
    Broadcast,
    Flat,
    Layout,
    Mesh,
    Partial,
    Placement,
    Shard,
    Split,
    parse_placement,
    shared,
)

Elements = npt.NDArray[np.int64]
quick = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def laid_out(draw: st.DrawFn, flat: bool = True) -> tuple[Layout, tuple[int, ...]]:
    """A layout of any placements on a mesh of up to 24 ranks in any order, and a shape that it suits."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    sizes = draw(st.lists(st.integers(1, 4), max_size=3).filter(lambda found: math.prod(found) <= 24))
    axes = tuple((f"axis{index}", size) for index, size in enumerate(sizes))
    ranks = draw(st.permutations(range(math.prod(sizes))))
    splits: st.SearchStrategy[Placement] = st.builds(Split, st.integers(0, len(shape) - 1))
    kinds = [splits, st.just(Broadcast()), st.just(Partial())] + ([st.just(Flat())] if flat else [])
    return Layout(Mesh(axes, tuple(ranks)), tuple(draw(st.one_of(kinds)) for _ in axes)), shape


def pairs(edges: list[int]) -> tuple[tuple[int, int], ...]:
    """Every second gap between ascending numbers."""
    return tuple(zip(edges[::2], edges[1::2], strict=False))


def elements(shard: Shard, shape: tuple[int, ...]) -> Elements:
    """Numbers of the elements that a shard holds in the flattened whole, in the order of its memory."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    inside = numbers[tuple(slice(a, b) for a, b in zip(shard.box.start, shard.box.stop, strict=True))]
    return inside.ravel()[shard.start : shard.stop]


@quick
@given(laid_out())
def test_every_element_is_held_once_for_each_combination_of_replicas(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    held = Counter(n for rank in layout.mesh.ranks for n in elements(layout.shard(shape, rank), shape).tolist())
    copies = math.prod(
        size
        for size, placement in zip(layout.mesh.shape, layout.placements, strict=True)
        if isinstance(placement, Broadcast | Partial)
    )
    assert held == dict.fromkeys(range(math.prod(shape)), copies)


@quick
@given(laid_out())
def test_holders_are_those_with_the_same_elements_and_no_two_groups_overlap(
    case: tuple[Layout, tuple[int, ...]],
) -> None:
    layout, shape = case
    for rank, other in itertools.product(layout.mesh.ranks, repeat=2):
        mine, theirs = elements(layout.shard(shape, rank), shape), elements(layout.shard(shape, other), shape)
        if other in layout.holders(rank):
            assert mine.tolist() == theirs.tolist()
        else:
            assert not set(mine.tolist()) & set(theirs.tolist())
    assert all(rank in layout.holders(rank) for rank in layout.mesh.ranks)


@quick
@given(laid_out())
def test_runs_and_boxes_of_a_shard_are_its_elements_in_its_order(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    for rank in layout.mesh.ranks:
        shard = layout.shard(shape, rank)
        wanted = elements(shard, shape)
        assert math.prod(shard.shape) == shard.size == len(wanted)
        runs = [np.arange(first, last) for first, last in shard.runs(shape)]
        assert np.concatenate([*runs, wanted[:0]]).tolist() == wanted.tolist()
        at = 0
        for box, offset in shard.boxes():
            assert offset == at
            assert elements(Shard.of(box), shape).tolist() == wanted[at : at + box.size].tolist()
            at += box.size
        assert at == len(wanted)
        assert len(shard.boxes()) <= max(1, 2 * len(shape) - 1)


@quick
@given(laid_out(flat=False), st.data())
def test_splits_are_balanced_and_those_of_one_dimension_nest(
    case: tuple[Layout, tuple[int, ...]], data: st.DataObject
) -> None:
    layout, shape = case
    rank = data.draw(st.sampled_from(layout.mesh.ranks))
    box = Region.whole(shape)
    for at, parts, placement in zip(layout.mesh.place(rank), layout.mesh.shape, layout.placements, strict=True):
        if isinstance(placement, Split):
            dim = placement.dim
            first, last = split(box.shape[dim], parts)[at]
            start, stop = list(box.start), list(box.stop)
            start[dim], stop[dim] = box.start[dim] + first, box.start[dim] + last
            box = Region(tuple(start), tuple(stop))
    assert layout.shard(shape, rank) == Shard(
        box, 0, box.size, tuple(p.op for p in layout.placements if isinstance(p, Partial))
    )


def test_examples_that_a_reader_can_check() -> None:
    uneven = Layout.by_axis(Mesh.of(tp=6), tp=Split(0))
    assert [uneven.shard((20, 3), rank).shape for rank in range(6)] == [(4, 3), (4, 3), (3, 3), (3, 3), (3, 3), (3, 3)]
    small = Layout.by_axis(Mesh.of(tp=4), tp=Split(1))
    assert [small.shard((5, 2), rank).shape for rank in range(4)] == [(5, 1), (5, 1), (5, 0), (5, 0)]
    nested = Layout(Mesh.of(a=2, b=3), (Split(0), Split(0)))
    assert [nested.shard((10,), rank).box.start[0] for rank in range(6)] == [0, 2, 4, 5, 7, 9]
    zero = Layout(Mesh.of(tp=2, dp=3), (Split(1), Flat()))
    assert [(zero.shard((4, 4), rank).start, zero.shard((4, 4), rank).stop) for rank in range(3)] == [
        (0, 3),
        (3, 6),
        (6, 8),
    ]
    assert zero.shard((4, 4), 1).shape == (3,)
    assert zero.shard((4, 4), 1).runs((4, 4)) == ((5, 6), (8, 10))
    assert Layout.single(7).shard((2,), 7).whole
    assert Layout.replicated(Mesh.of(dp=2)).holders(0) == (0, 1)
    assert Layout(Mesh.of(dp=2), (Partial("max"),)).shard((2,), 1).partial == ("max",)
    assert Layout.replicated(Mesh.of()).shard((), 0).shape == ()


@quick
@given(st.lists(st.integers(0, 60), max_size=16), st.lists(st.integers(0, 60), max_size=16))
def test_shared_is_what_two_lists_of_ranges_have_in_common(one: list[int], other: list[int]) -> None:
    a, b = (pairs(edges) for edges in (sorted(set(one)), sorted(set(other))))
    in_a, in_b = (np.concatenate([np.arange(x, y) for x, y in ranges] or [np.arange(0)]) for ranges in (a, b))
    found = shared(a, b)
    for at_a, at_b, length in found:
        assert in_a[at_a : at_a + length].tolist() == in_b[at_b : at_b + length].tolist()
    assert sum(length for *_, length in found) == len(np.intersect1d(in_a, in_b))
    assert not any(p[0] + p[2] == q[0] and p[1] + p[2] == q[1] for p, q in itertools.pairwise(found)), (
        "two that could be one"
    )


@quick
@given(laid_out())
def test_json_reads_back_as_the_same(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, _ = case
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize("placement", [Split(0), Split(12), Broadcast(), Partial(), Partial("max"), Flat()])
def test_placements_read_back_what_they_write(placement: Placement) -> None:
    assert parse_placement(str(placement)) == placement
    assert parse_placement(f" {placement} ") == placement


@pytest.mark.parametrize("text", ["", "S", "S()", "S(-1)", "S(a)", "S(0", "P()", "P(mean)", "X", "b", "F(0)", "S(²)"])
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"no placement|combine by"):
        parse_placement(text)


def test_groups_are_the_lines_along_an_axis() -> None:
    mesh = Mesh((("dp", 2), ("tp", 3)), (5, 4, 3, 2, 1, 0))
    assert mesh.groups(0) == ((5, 2), (4, 1), (3, 0))
    assert mesh.groups(1) == ((5, 4, 3), (2, 1, 0))
    assert mesh.place(1) == (1, 1)
    assert (str(mesh), str(Mesh.of())) == ("dp=2,tp=3", "one rank")


def test_errors_say_what_is_wrong() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    with pytest.raises(UsageError, match="two axes of a mesh have one name: a, a"):
        Mesh((("a", 1), ("a", 2)))
    with pytest.raises(UsageError, match="at least one rank"):
        Mesh.of(dp=0)
    for ranks in ((0, 1), (0, 1, 2, 2), (0, 1, 2, -1)):
        with pytest.raises(UsageError, match="4 different ranks"):
            Mesh(mesh.axes, ranks)
    with pytest.raises(UsageError, match="rank 4 is not on mesh"):
        mesh.place(4)
    with pytest.raises(UsageError, match="2 axes and needs as many placements, not S\\(0\\)"):
        Layout(mesh, (Split(0),))
    with pytest.raises(UsageError, match="no axis pp"):
        Layout.by_axis(mesh, pp=Split(0))
    with pytest.raises(UsageError, match="S\\(1\\) needs a dimension 1; the tensor has shape \\(4,\\)"):
        Layout.by_axis(mesh, tp=Split(1)).shard((4,), 0)
    with pytest.raises(UsageError, match="dimension of 0 or more"):
        Split(-1)
    with pytest.raises(UsageError, match="combine by one of"):
        Partial("mean")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        "text",
        {"mesh": [["a"]], "ranks": [0], "placements": ["B"]},
        {"mesh": [["a", "x"]], "ranks": [0], "placements": ["B"]},
        {"mesh": [["a", 1]], "ranks": [0], "placements": ["Q"]},
        {"mesh": [["a", 1]], "ranks": [0], "placements": [3]},
        {"mesh": [["a", 2]], "ranks": [0], "placements": ["B"]},
        {"mesh": [["a", 1]], "ranks": 3, "placements": ["B"]},
    ],
)
def test_malformed_json_is_refused(data: object) -> None:
    with pytest.raises(UsageError):
        Layout.from_json(data)
