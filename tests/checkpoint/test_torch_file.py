"""Files and pickles written without torch are what torch reads, and what Python's pickle and zipfile make of them."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import torch_file
from checkpoint.dtypes import ITEMSIZE, TORCH
from checkpoint.pickling import Call, Made, Name, Pairs, dumps, ordered
from checkpoint.torch_file import Saved, length, scalar, write
from collectives.errors import UsageError

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=20,
)


def alike(a: Any, b: Any) -> bool:
    """Whether two values are equal and of the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


@given(PLAIN)
def test_plain_values_come_back_from_a_pickle(value: Any) -> None:
    assert alike(pickle.loads(dumps(value)), value)


def test_nodes_name_classes_that_are_not_imported() -> None:
    value = {
        "ordered": ordered({"b": 1, "a": 2}),
        "called": Call(Name("builtins", "complex"), (1.0, 2.0)),
        "made": Made(Name("argparse", "Namespace"), {"tp": 2}),
        "keys": Pairs(((Call(Name("builtins", "complex"), (1.0, 0.0)), "one"),)),
        "many": [f"word {number % 300}" for number in range(600)],
    }
    found = pickle.loads(dumps(value))
    assert list(found["ordered"].items()) == [("b", 1), ("a", 2)]
    assert isinstance(found["ordered"], collections.OrderedDict)
    assert found["called"] == 1 + 2j
    assert found["made"].tp == 2
    assert found["keys"] == {1 + 0j: "one"}
    assert found["many"] == value["many"]


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1), 1 << 3000])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(UsageError):
        dumps({"inside": [value]})


def tensor(dtype: str, shape: tuple[int, ...], blocks: int = 1) -> tuple[Saved, bytes]:
    size = int(np.prod(shape)) * ITEMSIZE[dtype]
    raw = np.arange(size, dtype=np.uint8) % 2 if dtype == "BOOL" else np.arange(size, dtype=np.uint8)
    return Saved(dtype, shape, lambda: np.array_split(raw, blocks)), raw.tobytes()


def stored(path: Path, value: Any) -> int:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        return write(out, value)
    finally:
        os.close(out)


@pytest.mark.parametrize("dtype", list(ITEMSIZE))
def test_torch_loads_tensors_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    found = {}
    for shape in ((), (3,), (2, 3, 4), (0, 5)):
        found[str(shape)], raw = tensor(dtype, shape, 2)
        written = stored(tmp_path / "x.pt", {"tensor": found[str(shape)]})
        assert written == (tmp_path / "x.pt").stat().st_size == length({"tensor": found[str(shape)]})
        for mapped in (False, True):
            loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)["tensor"]
            assert TORCH[str(loaded.dtype).removeprefix("torch.")] == dtype
            assert tuple(loaded.shape) == shape
            assert loaded.is_contiguous()
            assert bytes(loaded.reshape(-1).view(torch.uint8).tolist()) == raw if loaded.numel() else raw == b""


def test_the_zip_is_sound_and_aligned_and_may_follow_another(tmp_path: Path) -> None:
    one, raw = tensor("F32", (100,))
    first = stored(tmp_path / "a.pt", {"w": one, "step": scalar(3.0), "note": ["x"]})
    data = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None, "a checksum is wrong"
        assert archive.read("archive/data/0") == raw
    assert data.index(raw) % 64 == 0
    out = os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT)
    lengths = [write(out, {"w": one, "step": scalar(3.0), "note": ["x"]}) for _ in range(2)]
    os.close(out)
    assert lengths == [first, first]
    assert (tmp_path / "b").read_bytes() == data + data
    second = torch.load(io.BytesIO((tmp_path / "b").read_bytes()[first:]), weights_only=True)
    assert second["step"] == 3.0
    assert second["note"] == ["x"]


def test_sizes_beyond_32_bits_are_told_as_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, raw = tensor("U8", (200,))
    monkeypatch.setattr(torch_file, "_LARGE", 150)  # in the place of 4 GiB
    stored(tmp_path / "x.pt", {"w": one})
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/0").file_size == 200
    assert bytes(torch.load(tmp_path / "x.pt", weights_only=True)["w"].tolist()) == raw
