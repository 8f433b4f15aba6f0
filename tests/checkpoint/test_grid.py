"""The grid covers a tensor once, follows from its shape, and suits splits of the first two dimensions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.grid import LARGEST, SMALLEST, Grid
from collectives.errors import UsageError
from collectives.region import Region, split

shapes = st.lists(st.integers(0, 70), max_size=4).map(tuple)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, st.sampled_from([1, 2, 4096, 1 << 20]))
def test_chunks_cover_every_element_once(shape: tuple[int, ...], itemsize: int) -> None:
    grid = Grid.of(shape, itemsize)
    if math.prod(shape) > 50_000:
        return
    times = np.zeros(shape, dtype=np.int64)
    for box in grid.boxes():
        assert not box.empty
        times[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] += 1
    assert (times == 1).all()
    assert grid == Grid(shape, grid.cuts)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, st.sampled_from([1, 4096, 1 << 20]), st.data())
def test_touching_names_the_chunks_with_elements_of_a_box(
    shape: tuple[int, ...], itemsize: int, data: st.DataObject
) -> None:
    grid = Grid.of(shape, itemsize)
    corners = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    region = Region(tuple(a for a, _ in corners), tuple(b for _, b in corners))
    if grid.count > 5000:
        return
    wanted = [index for index, box in enumerate(grid.boxes()) if not box.intersect(region).empty]
    assert list(grid.touching(region)) == wanted


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 11008), (32000, 4096), (1024, 1024), (64, 1024, 512), (1 << 26,)]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_splits_by_two_four_and_eight_are_whole_chunks(shape: tuple[int, ...], itemsize: int) -> None:
    grid = Grid.of(shape, itemsize)
    for dim in range(min(2, len(shape))):
        for parts in (2, 4, 8):
            edges = {first for first, _ in split(shape[dim], parts)}
            assert edges <= set(grid.edges[dim])
    sizes = {box.size * itemsize for box in grid.boxes()}
    assert min(sizes) >= SMALLEST
    assert max(sizes) <= LARGEST


def test_an_uneven_dimension_is_cut_by_eight_first() -> None:
    grid = Grid.of((50257, 768), 4)
    assert {first for first, _ in split(50257, 8)} <= set(grid.edges[0])
    assert grid.cuts == ((8, 2), (8, 1))


def test_small_tensors_are_one_chunk_and_empty_ones_none() -> None:
    assert [Grid.of(shape, 4).count for shape in ((), (1,), (4096,), (64, 64), (0,), (3, 0, 5))] == [1, 1, 1, 1, 0, 0]
    assert Grid.of((), 8).box(0) == Region((), ())


@pytest.mark.parametrize(
    ("shape", "cuts"), [((4,), ()), ((4,), ((0, 1),)), ((4,), ((1, 5),)), ((4,), ((3, 2),)), ((0,), ((2, 1),))]
)
def test_a_grid_that_leaves_parts_empty_is_refused(shape: tuple[int, ...], cuts: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(UsageError):
        Grid(shape, cuts)
