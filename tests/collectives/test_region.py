"""Regions against numpy's own indexing, and the balanced split."""

import itertools
import random

import numpy as np
import pytest

from collectives.errors import UsageError
from collectives.region import Region, chunk, split


def test_split_is_balanced_with_the_remainder_first() -> None:
    assert [stop - start for start, stop in split(20, 6)] == [4, 4, 3, 3, 3, 3]
    assert split(2, 4) == ((0, 1), (1, 2), (2, 2), (2, 2))
    assert split(0, 2) == ((0, 0), (0, 0))


@pytest.mark.parametrize("count", [0, 1, 6, 7, 97])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_split_covers_everything_in_order_and_agrees_with_numpy(count: int, parts: int) -> None:
    pieces = split(count, parts)
    lengths = [len(piece) for piece in np.array_split(np.arange(count), parts)]
    assert [stop - start for start, stop in pieces] == lengths
    assert pieces[0][0] == 0
    assert pieces[-1][1] == count
    assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))


def test_chunk_gives_any_parts_at_once() -> None:
    start, stop = chunk(20, 6, np.array([[5, 0], [1, 5]]))
    assert start.tolist() == [[17, 0], [4, 17]]
    assert stop.tolist() == [[20, 4], [8, 20]]


@pytest.mark.parametrize(("count", "parts"), [(-1, 2), (4, 0)])
def test_split_refuses_the_impossible(count: int, parts: int) -> None:
    with pytest.raises(UsageError, match="cannot split"):
        split(count, parts)


def test_shape_size_and_emptiness() -> None:
    box = Region((1, 0), (3, 5))
    assert (box.shape, box.size, box.empty) == ((2, 5), 10, False)
    assert Region((1, 2), (3, 2)).empty
    assert Region.flat(2, 5) == Region((2,), (5,))
    assert Region.whole((2, 3)) == Region((0, 0), (2, 3))
    assert (Region.whole(()).size, Region.whole(()).empty) == (1, False)
    assert len({box, Region((1, 0), (3, 5)), Region.flat(0, 1)}) == 2


@pytest.mark.parametrize(("start", "stop"), [((0,), (1, 2)), ((-1,), (2,)), ((3,), (2,))])
def test_a_region_that_is_no_box_is_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="a region needs"):
        Region(start, stop)


def boxes(shape: tuple[int, ...], seed: int, count: int) -> list[Region]:
    chance = random.Random(seed)
    corners = [[sorted(chance.choices(range(extent + 1), k=2)) for extent in shape] for _ in range(count)]
    return [Region(tuple(a for a, _ in box), tuple(b for _, b in box)) for box in corners]


def inside(box: Region, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = True
    return mask


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 1, 4), (2, 3, 2, 3)])
def test_intersection_and_containment_agree_with_masks(shape: tuple[int, ...]) -> None:
    for one, other in itertools.pairwise(boxes(shape, 1, 200)):
        both = inside(one, shape) & inside(other, shape)
        assert (inside(one.intersect(other), shape) == both).all()
        assert one.contains(other) == bool((both == inside(other, shape)).all())


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 1, 4), (2, 3, 2, 3), (3, 0, 2), ()])
def test_runs_are_the_fewest_that_cover_the_box(shape: tuple[int, ...]) -> None:
    for box in [*boxes(shape, 2, 200), Region.whole(shape)]:
        flat = np.concatenate([[False], inside(box, shape).ravel(), [False]])
        edges = np.flatnonzero(flat[1:] != flat[:-1]).reshape(-1, 2)
        assert box.runs(shape) == tuple(map(tuple, edges.tolist()))


def test_a_split_of_the_first_dimension_is_one_run() -> None:
    assert Region((2, 0, 0), (4, 5, 6)).runs((8, 5, 6)) == ((60, 120),)
    assert Region((0, 1), (3, 2)).runs((3, 4)) == ((1, 2), (5, 6), (9, 10))


def test_regions_of_another_dimension_or_tensor_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        Region.flat(0, 1).intersect(Region.whole((1, 1)))
    with pytest.raises(UsageError, match="does not lie within"):
        Region.flat(0, 5).runs((4,))
