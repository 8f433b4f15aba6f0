"""Pickles that execute code, damaged ones, and torch files of every form; nothing of them is ever run."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.files import Files
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import Opaque, TensorRef, UnknownPickle, loads, to_json
from collectives.errors import CorruptFile, RingholdError


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)), (exec, ("open('{}', 'w')",)), (open, ("{}", "w"))],
)
def test_no_function_is_called(tmp_path: Path, protocol: int, function: Any, arguments: tuple[str, ...]) -> None:
    mark = tmp_path / "executed"
    filled = tuple(argument.format(mark) for argument in arguments)
    data = pickle.dumps({"param": Evil(function, *filled)}, protocol)
    with pytest.raises(UnknownPickle, match="nothing was executed"):
        loads(data, "evil.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\ngetattr\n.",
        b"cbuiltins\n__import__\n(S'os'\ntR.",
        b"ctorch\nload\n.",
        b"ctorch.hub\nload\n.",
        b"cnumpy\nload\n.",
        b"\x80\x04\x8c\x05torch\x8c\x14storage._load_from_bytes\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x0a__import__\x93.",
        b"cmegatronx.evil\nCall\n.",
        b"cdeepspeed_evil\nCall\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_names_that_are_refused(data: bytes) -> None:
    with pytest.raises(RingholdError) as error:
        loads(data, "evil")
    assert error.value.exit_code == 4


def test_classes_of_the_libraries_become_records_and_are_not_imported() -> None:
    import sys

    data = (
        b"(dS'scaler'\ncdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}S'cur_scale'\nF2.0\nsbsS'backend'\n"
        b"cmegatron.core.transformer.enums\nAttnBackend\n(I1\ntRsS'signal'\ncsignal\nSignals\n(I15\ntRs."
    )
    value = loads(b"\x80\x02" + data, "args")
    assert isinstance(value["scaler"], Opaque)
    assert value["scaler"].get("cur_scale") == 2.0
    found, left_out = to_json(value)
    assert found == {"scaler": {"cur_scale": 2.0}, "backend": 1, "signal": 15}
    assert left_out == []
    assert "deepspeed" not in sys.modules
    assert "megatron" not in sys.modules


@pytest.mark.parametrize("protocol", range(6))
def test_objects_and_sets_of_every_protocol(protocol: int) -> None:
    import argparse

    whole = pickle.dumps({"args": argparse.Namespace(layers=3), "set": {1, 2}}, protocol)
    value = loads(whole, "args")
    assert value["set"] == {1, 2}
    assert value["args"].get("layers") == 3


def test_attributes_of_records_do_not_reach_the_interpreter() -> None:
    """A record's state may set any attribute; none of them is looked up when it is read."""
    data = b"\x80\x02cargparse\nNamespace\n)\x81}(S'__class__'\nS'x'\nS'__reduce__'\nS'y'\nub."
    value = loads(data, "args")
    assert type(value).__name__ == "Namespace"
    assert value.get("__class__") == "x"


def test_a_huge_memo_is_refused_before_it_is_made() -> None:
    with pytest.raises(CorruptFile, match="table of 2147483647"):
        loads(b"\x80\x02]r" + struct.pack("<I", 0x7FFFFFFF) + b".", "bomb")
    with pytest.raises(CorruptFile, match="table of 99999999"):
        loads(b"(lp99999999\n.", "bomb")


@pytest.mark.parametrize("protocol", range(6))
def test_a_huge_memo_is_found_behind_every_kind_of_value(protocol: int) -> None:
    value = {
        "numbers": [1, -5, 70000, 1 << 80, 1 << 3000, 2.5, None, True, *range(300)],
        "texts": ["short", "r\xff\xff\xff\xff" * 100, *map(str, range(300))],
        "bytes": [b"r" * 10, b"p99999999\n" * 100, bytearray(b"r....")],
        "others": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {5}, frozenset({6})],
    }
    whole = pickle.dumps(value, protocol)
    assert loads(whole, "good") == value
    for bomb in (b"r\xff\xff\xff\x7f.", b"p4000000000\n."):
        with pytest.raises(CorruptFile, match="asks for a table"):
            loads(whole[:-1] + bomb, "bomb")


def test_references_that_unfold_are_refused() -> None:
    value: Any = ["x"] * 10
    for _ in range(12):
        value = [value] * 10
    with pytest.raises(CorruptFile, match="more than"):
        to_json(loads(pickle.dumps(value), "bomb"), "args")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_pickles_raise_our_errors_alone(data: st.DataObject) -> None:
    whole = pickle.dumps({"a": [1, 2.0, "three"], "b": (None, True), "c": b"bytes"}, 2)
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    broken = whole[:at] if cut else whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    try:
        loads(broken, "broken")
    except RingholdError as error:
        assert error.exit_code == 4


STATE = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "t": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "view": torch.arange(100, dtype=torch.int64)[17:23],
    "bf16": torch.randn(5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "f8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "nested": [{"x": 1, "shape": torch.Size([2, 3]), "dtype": torch.float16}],
}


@pytest.mark.parametrize("new", [True, False])
def test_torch_files_of_both_forms(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=new)
    with Files() as files:
        loaded = TorchFile(files.get(path))
        for name, tensor in STATE.items():
            ref = loaded.value[name]
            if isinstance(tensor, torch.Tensor):
                assert isinstance(ref, TensorRef)
                stored = loaded.stored(ref)
                assert stored.shape == tuple(tensor.shape)
                expected = (
                    tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                )
                assert stored.whole().tobytes() == expected, name
        assert loaded.value["nested"] == [{"x": 1, "shape": (2, 3), "dtype": "F16"}]


def test_a_torch_file_within_another(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(torch.arange(5), inner)
    path = tmp_path / "items.distcp"
    path.write_bytes(b"x" * 37 + inner.getvalue() + b"y" * 11)
    with Files() as files:
        loaded = TorchFile(files.get(path), 37, len(inner.getvalue()))
        assert loaded.stored(loaded.value).whole().view("<i8").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("new", [True, False])
def test_truncated_torch_files(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for length in [0, 1, 3, 100, len(whole) // 2, len(whole) - 100, len(whole) - 23]:
        path.write_bytes(whole[:length])
        with Files() as files, pytest.raises(CorruptFile):
            loaded = TorchFile(files.get(path))
            for value in loaded.value.values():
                if isinstance(value, TensorRef):
                    loaded.stored(value)


def test_a_compressed_or_alien_zip(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with Files() as files, pytest.raises(CorruptFile, match="compressed"):
        TorchFile(files.get(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with Files() as files, pytest.raises(CorruptFile, match=r"data\.pkl"):
        TorchFile(files.get(path))


def test_a_tensor_beyond_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(torch.arange(4, dtype=torch.float32), path)
    with Files() as files:
        loaded = TorchFile(files.get(path))
        ref = loaded.value
        longer = TensorRef(ref.storage, 0, (1 << 40,), (1,), "F32")
        with pytest.raises(CorruptFile, match="ends behind its storage"):
            loaded.stored(longer)
