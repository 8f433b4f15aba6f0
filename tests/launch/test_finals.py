"""The final state on disk: exact, whole or absent, and refused when it is not what was written."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from collectives.errors import CorruptFile
from collectives.state import state_hash
from launch import finals
from launch.trainer import State


def sample_state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {
            "blocks.0.weight": torch.randn(3, 4, generator=generator),
            "norm": torch.ones(2, dtype=torch.float64),
        },
        "optimizer": {"state": {"norm": {"step": torch.tensor(5)}}, "param_groups": [{"lr": 0.1 + 0.2}]},
        "rng": generator.get_state(),
        "step": 5,
        "job": {"text": "abc", "none": None},
    }


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = sample_state()
    digest = finals.save(tmp_path, state, {"loss": 2.5, "config": {"steps": 5}})
    final = finals.load(tmp_path / finals.FINAL)
    assert final.hash == digest == state_hash(state) == state_hash(final.state)
    assert final.details == {"loss": 2.5, "config": {"steps": 5}}


def test_the_summary_is_for_people_and_the_tensors_for_any_reader(tmp_path: Path) -> None:
    digest = finals.save(tmp_path, sample_state(), {"loss": 2.5})
    summary = json.loads((tmp_path / finals.SUMMARY).read_text())
    assert summary["hash"] == digest
    assert summary["state"]["step"] == 5
    assert summary["state"]["optimizer"]["param_groups"] == [{"lr": 0.1 + 0.2}]
    assert "model/blocks.0.weight" in load_file(tmp_path / finals.FINAL)


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    assert not finals.exists(tmp_path)
    finals.save(tmp_path, sample_state(), {"loss": 1.0})
    finals.save(tmp_path, sample_state(), {"loss": 2.0})
    assert finals.exists(tmp_path)
    assert finals.load(tmp_path / finals.FINAL).details["loss"] == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [finals.SUMMARY, finals.FINAL]


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    finals.save(tmp_path, sample_state(), {"loss": 1.0})
    state = sample_state()
    state["model"]["norm"] = torch.ones(3).to_sparse()
    with pytest.raises(Exception, match="sparse"):
        finals.save(tmp_path, state, {})
    assert finals.load(tmp_path / finals.FINAL).details["loss"] == 1.0
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    finals.save(tmp_path, sample_state(), {})
    whole = (tmp_path / finals.FINAL).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = tmp_path / "damaged.safetensors"
    for data, message in (
        (whole[:-1], "cannot be read as safetensors"),
        (whole[:100], "cannot be read as safetensors"),
        (b"", "cannot be read as safetensors"),
        (whole[:header] + bytes([whole[header] ^ 1]) + whole[header + 1 :], "was altered"),
        (whole.replace(b'\\"step\\": 5', b'\\"step\\": 6'), "was altered"),
    ):
        damaged.write_bytes(data)
        with pytest.raises(CorruptFile, match=message) as caught:
            finals.load(damaged)
        assert str(damaged) in str(caught.value)
        assert caught.value.exit_code == 4


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CorruptFile, match="no training state"):
        finals.load(path)
    for text in ("no json", "{}", '{"hash": 1, "state": {}}', '{"hash": 1, "state": 3}'):
        save_file({"some/weight": torch.ones(2)}, path, metadata={"ringhold": text})
        with pytest.raises(CorruptFile, match="malformed"):
            finals.load(path)
    with pytest.raises(CorruptFile, match="cannot be read"):
        finals.load(tmp_path / "missing.safetensors")
