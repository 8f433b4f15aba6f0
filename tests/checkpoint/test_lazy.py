"""Lazy tensors against numpy: every box of every way to put a tensor together, and what does not make one up."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.files import File, Files, Memory, Unreadable
from checkpoint.lazy import (
    Cast,
    Cut,
    Flat,
    Given,
    Mean,
    Part,
    PiecesMissing,
    Placed,
    Reshaped,
    Stored,
    from_numbers,
    slices,
    to_numbers,
)
from checkpoint.source import Entry, blocks
from collectives.errors import CorruptFile, UnsupportedTensor
from collectives.region import Region

fast = settings(max_examples=40, derandomize=True, deadline=None)
shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


def memory(array: "np.ndarray[tuple[int, ...], np.dtype[np.uint32]]") -> File:
    return Memory(Path("memory"), array.tobytes())


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    start = tuple(draw(st.integers(0, extent)) for extent in shape)
    return Region(start, tuple(draw(st.integers(a, extent)) for a, extent in zip(start, shape, strict=True)))


def ramp(shape: tuple[int, ...]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint32]]":
    return np.arange(math.prod(shape), dtype="<u4").reshape(shape)


@fast
@given(st.data())
def test_a_box_of_a_stored_tensor_of_any_strides(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    order = data.draw(st.permutations(range(len(shape))))
    kept = ramp(tuple(shape[dim] for dim in order))
    array = kept.transpose(np.argsort(order)) if shape else kept
    strides = tuple(step // 4 for step in array.strides)
    tensor = Stored(memory(kept), 0, "F32", shape, strides)
    box = data.draw(boxes(shape))
    assert tensor.read(box).tobytes() == array[slices(box)].tobytes()


@fast
@given(st.data())
def test_flat_pieces_of_any_cut(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    array = ramp(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, array.size), max_size=5)))
    edges = [0, *cuts, array.size]
    runs = []
    for a, b in pairwise(edges):
        padded = np.concatenate([np.full(3, 0xFFFFFFFF, "<u4"), array.reshape(-1)[a:b], np.full(2, 0xFFFFFFFF, "<u4")])
        runs.append((a, Stored.packed(memory(padded), 12, "F32", (b - a,))))
    tensor = Flat("t", shape, data.draw(st.permutations(runs)))
    box = data.draw(boxes(shape))
    assert tensor.read(box).tobytes() == array[slices(box)].tobytes()


@fast
@given(st.data())
def test_boxes_of_others_cuts_and_other_shapes(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    array = ramp(shape)
    dim = data.draw(st.integers(0, len(shape) - 1))
    at = data.draw(st.integers(0, shape[dim]))
    parts = []
    for low, high in ((0, at), (at, shape[dim])):
        start = tuple(low if d == dim else 0 for d in range(len(shape)))
        stop = tuple(high if d == dim else extent for d, extent in enumerate(shape))
        box = Region(start, stop)
        piece = np.ascontiguousarray(array[slices(box)])
        parts.append(Part(box, Stored.packed(memory(piece), 0, "F32", piece.shape), (0,) * len(shape)))
    tensor = Placed("t", shape, parts)
    box = data.draw(boxes(shape))
    assert tensor.read(box).tobytes() == array[slices(box)].tobytes()
    row = data.draw(st.integers(0, shape[0] - 1))
    layer = Cut(tensor, Region((row, *(0 for _ in shape[1:])), (row + 1, *shape[1:])), (0,))
    inner = data.draw(boxes(shape[1:]))
    assert layer.read(inner).tobytes() == array[row][slices(inner)].tobytes()
    other = data.draw(st.sampled_from([(array.size,), (1, array.size), tuple(reversed(shape)), (*shape, 1)]))
    seen = data.draw(boxes(other))
    assert Reshaped(tensor, other).read(seen).tobytes() == array.reshape(other)[slices(seen)].tobytes()


@fast
@given(shapes, st.integers(1, 400))
def test_blocks_follow_each_other_and_are_bounded(shape: tuple[int, ...], limit: int) -> None:
    array = ramp(shape)
    found = [array[slices(box)] for box in blocks(Entry("t", "fp32", "F32", shape), limit)]
    assert b"".join(piece.tobytes() for piece in found) == array.tobytes()
    assert all(piece.nbytes <= max(limit, 4) for piece in found)


def test_what_no_rank_stores_is_an_error_never_data() -> None:
    file = memory(ramp((10,)))
    with pytest.raises(PiecesMissing, match=r"elements 4 to 6 .* by no rank"):
        Flat("t", (10,), [(0, Stored.packed(file, 0, "F32", (4,))), (6, Stored.packed(file, 0, "F32", (4,)))])
    with pytest.raises(PiecesMissing, match="twice"):
        Flat("t", (10,), [(0, Stored.packed(file, 0, "F32", (6,))), (4, Stored.packed(file, 0, "F32", (6,)))])
    with pytest.raises(PiecesMissing, match="store 8 elements of 10"):
        Flat("t", (10,), [(0, Stored.packed(file, 0, "F32", (8,)))])
    whole = Stored.packed(file, 0, "F32", (5, 2))
    halves = [Part(Region((0, 0), (3, 2)), whole, (0, 0)), Part(Region((2, 0), (4, 2)), whole, (0, 0))]
    with pytest.raises(PiecesMissing, match="some twice"):
        Placed("t", (5, 2), halves)
    with pytest.raises(PiecesMissing, match="outside"):
        Placed("t", (2, 2), halves)


def test_averages_in_the_dtypes_own_arithmetic() -> None:
    a, b = np.array([1, 2, 4], np.float32), np.array([2, 4, 1e-7], np.float32)
    mean = Mean("t", [Given(x.tobytes(), "F32", (3,)) for x in (a, b)])
    assert mean.whole().tobytes() == ((a + b) / np.float32(2)).tobytes()
    with pytest.raises(UnsupportedTensor):
        Mean("t", [Given(b"\0" * 8, "I64", (1,))] * 2)


def test_casts_round_as_torch_does() -> None:
    import torch

    torch.manual_seed(3)
    values = torch.cat([torch.randn(2000) * 10.0 ** torch.randint(-40, 38, (2000,)).float(), torch.tensor([0.0, -0.0])])
    special = torch.tensor([float("inf"), float("-inf"), 65519.0, 65520.0, 3.3895e38, 1.0039062, 1.01171875])
    values = torch.cat([values, special])
    raw = values.numpy().view(np.uint8)
    for ours, theirs in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F64", torch.float64)):
        cast = Cast(Given(raw.tobytes(), "F32", (len(values),)), ours)
        assert cast.whole().tobytes() == values.to(theirs).view(torch.uint8).numpy().tobytes(), ours
        assert to_numbers(cast.whole(), ours).astype("<f4").tobytes() == values.to(theirs).float().numpy().tobytes()
    nan = from_numbers(np.array([np.nan], np.float32), "BF16")
    assert np.isnan(to_numbers(nan, "BF16")).all()


def test_files_tell_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    with Files() as files:
        assert files.get(path).read(2, 3) == b"234"
        with pytest.raises(CorruptFile, match="should have 11 or more"):
            files.get(path).read(8, 3)
        with pytest.raises(Unreadable, match="No such file"):
            files.get(tmp_path / "none")
        with pytest.raises(Unreadable, match="a folder where a file"):
            files.get(tmp_path)
        path.write_bytes(b"0")
        with pytest.raises(CorruptFile, match="ended while it was read"):
            files.get(path).read(2, 3)
    unkept = File(path, keep=False)
    assert unkept.read(0, 1) == b"0"
