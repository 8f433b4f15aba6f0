"""Writers of other formats: layouts, what is written beside the tensors, interruptions. Values: `test_matrix`."""

import json
import shutil
import signal
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from checkpoint.compare import compare
from checkpoint.convert import WRITERS, Journal, WriteOptions, convert
from checkpoint.formats import output, write_dcp, write_megatron, write_universal
from checkpoint.formats.detect import open_source
from checkpoint.formats.megatron_keys import Key, extra_state, key_of, split_dim
from checkpoint.formats.universal_info import Merging, written_info
from checkpoint.source import Bytes, Entry, Group
from collectives.errors import UsageError
from collectives.region import Region
from tests.harness.checkpoints import unpacked
from tests.harness.foreign import RINGHOLD, environment


class Arrays:
    """A source over arrays in memory, by key. `fail_after`: reading fails after so many reads."""

    format = "arrays"

    def __init__(self, arrays: dict[str, np.ndarray], groups: list[Group], **extras: Any) -> None:
        dtypes = {"float32": "F32", "int64": "I64", "uint8": "U8"}
        self._arrays = arrays
        self.entries = {}
        for key, array in arrays.items():
            name, state = key.rsplit("|", 1)
            self.entries[key] = Entry(name, state, dtypes[array.dtype.name], array.shape)
        self.groups = groups
        self.extras = extras
        self.fail_after = -1

    def read(self, key: str, box: Region) -> Bytes:
        if self.fail_after == 0:
            raise KeyboardInterrupt
        self.fail_after -= 1
        part = self._arrays[key][tuple(map(slice, box.start, box.stop))]
        return np.ascontiguousarray(part).reshape(-1).view(np.uint8)

    def close(self) -> None:
        pass


def small(**extras: Any) -> Arrays:
    arrays: dict[str, np.ndarray] = {"ids|param": np.arange(5)}
    for number, name in enumerate(("a", "b.weight", "c")):
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            arrays[f"{name}|{state}"] = np.full((7, 3 + number), number, np.float32)
        arrays[f"{name}|step"] = np.array(3, np.float32)
    options = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8}
    groups = [Group(("a", "b.weight"), options | {"weight_decay": 0.1}), Group(("c",), options | {"weight_decay": 0.0})]
    return Arrays(arrays, groups, iteration=12, tied=[["b.weight", "head.weight"]], **extras)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_axes_that_megatron_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tp, pp, ep"):
        convert(unpacked("mcore") / "tp2pp2" / "torch_dist", tmp_path / "out", to="megatron", layout={"stages": 2})
    assert list(tmp_path.iterdir()) == []


def test_dcp_cuts_files_as_ranks_of_fsdp2_ask_for_them(tmp_path: Path) -> None:
    write_dcp.write(small(), tmp_path, WriteOptions({"dp": 2, "tp": 2}), lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metadata", *(f"__{n}_0.distcp" for n in range(4))]
    metadata: Any = FileSystemReader(tmp_path).read_metadata()
    described = metadata.state_dict_metadata["model.a"]
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks]
    assert boxes == [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((4, 0), (2, 3)), ((6, 0), (1, 3))]
    files = {
        index.offset[0]: info.relative_path for index, info in metadata.storage_data.items() if index.fqn == "model.a"
    }
    assert files == {0: "__0_0.distcp", 2: "__1_0.distcp", 4: "__2_0.distcp", 6: "__3_0.distcp"}
    places = {index.fqn: (info.relative_path, info.offset) for index, info in metadata.storage_data.items()}
    assert places["model.head.weight"] == places["model.b.weight"], "tied names have one copy"


def test_a_flattened_optimizer_stays_flattened(tmp_path: Path) -> None:
    source = unpacked("fsdp") / "dp4_flatten" / "dcp"
    convert(source, tmp_path / "out", to="dcp")
    wanted: Any = FileSystemReader(source).read_metadata()
    found: Any = FileSystemReader(tmp_path / "out").read_metadata()
    optimizer = {key for key in wanted.state_dict_metadata if key.startswith("optim.")}
    assert optimizer == {key for key in found.state_dict_metadata if key.startswith("optim.")}
    assert {key: wanted.planner_data[key] for key in optimizer} == {key: found.planner_data[key] for key in optimizer}


def test_universal_folders_give_stage_3_only_what_the_groups_agree_in(tmp_path: Path) -> None:
    source = small(scheduler={"last_epoch": 12}, client_state={"data": [1, 2]})
    write_universal.write(source, tmp_path, WriteOptions(), lambda _: None)
    assert (tmp_path / "latest_universal").read_text() == "global_step12"
    folder = tmp_path / "global_step12"
    state = load(folder / "zero" / "optimizer_state.pt")
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    assert state["param_groups"][0]["betas"] == (0.9, 0.99)
    (agreed,) = state["optimizer_state_dict"]["param_groups"]
    assert agreed == {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "params": [0]}
    assert state["optimizer_state_dict"]["state"][0]["step"] == 3.0
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):
        states = load(folder / f"{name}_model_states.pt")
        assert [list(group) for group in states["param_shapes"]] == [["a", "b.weight"], ["c"]]
        assert states["shared_params"] == {"head.weight": "b.weight"}
        assert states["module"]["ids"].tolist() == [0, 1, 2, 3, 4]
        assert (states["lr_scheduler"], states["data"], states["global_steps"]) == ({"last_epoch": 12}, [1, 2], 12)


@pytest.mark.parametrize("name", ["a/b", "..", "x\0y"])
def test_names_that_are_no_folders_are_refused(name: str, tmp_path: Path) -> None:
    arrays = {f"{name}|{state}": np.zeros(3, np.float32) for state in ("fp32", "exp_avg")}
    with pytest.raises(UsageError, match="cannot be the name of a folder"):
        write_universal.write(Arrays(arrays, [Group((name,))]), tmp_path, WriteOptions(), lambda _: None)


def test_atoms_say_how_a_tensor_parallel_job_cuts_them() -> None:
    merging = Merging(
        {
            "vocabulary_parameter_patterns": [r"embed\.weight"],
            "tp_replicated_parameter_patterns": [r".*norm"],
            "parameter_with_row_parallelism_patterns": [r".*\.proj\.weight"],
            "parameter_with_2_sub_params_cat_dim_0": [r".*\.gate_up"],
            "parameter_with_sub_params": [{"patterns": [r".*\.qkv"], "shape": [3, -1], "partition_dim": 0}],
        }
    )
    assert merging.of("embed.weight", (100, 8)) == {"vocab_tensor": True, "cat_dim": 0}
    assert merging.of("h.0.norm.weight", (8,)) == {}
    assert merging.of("h.0.proj.weight", (8, 8)) == {"cat_dim": 1}
    assert merging.of("h.0.gate_up", (16, 8)) == {"cat_dim": 0, "param_n_sub_params": 2}
    assert merging.of("h.0.other", (16, 8)) == {"cat_dim": 0}
    expert = merging.of("h.0.deepspeed_moe.experts.deepspeed_experts.3.up.weight", (16, 8))
    assert expert == {"is_expert_param": True, "ep_num_experts": -1, "cat_dim": 0}
    made = merging.of("h.0.qkv", (24, 8))["sub_param_shape"]
    assert made.state == {"patterns": [r".*\.qkv"], "shape": ((8, 8, 8), -1), "partition_dim": 0}
    assert written_info({"affine_map": {}, "original_vocab_size": 100}) == {
        "universal_checkpoint_version": 0.4,
        "original_vocab_size": 100,
    }


def test_keys_of_megatron() -> None:
    norm = key_of("decoder.layers.3.input_layernorm.weight")
    assert norm == Key("decoder.layers", "self_attention.linear_qkv.layer_norm_weight", 3)
    assert norm.alone == "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    expert = key_of("decoder.layers.0.mlp.experts.local_experts.7.linear_fc1.weight")
    assert (expert.text, expert.layer, expert.expert) == ("decoder.layers.mlp.experts.experts.linear_fc1.weight", 0, 7)
    assert key_of("decoder.layers.1.mlp.experts.linear_fc2.weight5").expert == 5
    assert key_of("decoder.final_layernorm.bias") == Key("", "decoder.final_layernorm.bias")
    assert [split_dim(f"x.{name}.weight") for name in ("linear_qkv", "linear_fc2", "router")] == [0, 1, None]
    assert extra_state("decoder.layers.mlp.linear_fc1.weight") == "decoder.layers.mlp.linear_fc1._extra_state"
    assert extra_state("decoder.final_layernorm.weight") is None


def test_layers_that_are_not_alike_have_keys_of_their_own(tmp_path: Path) -> None:
    arrays = {
        f"decoder.layers.{layer}.mlp.linear_fc1.weight|{state}": np.full((4 + layer, 2), layer, np.float32)
        for layer in range(3)
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }
    source = Arrays(arrays, [Group(tuple(dict.fromkeys(key.rsplit("|", 1)[0] for key in arrays)))], iteration=1)
    write_megatron.write(source, tmp_path, WriteOptions({"tp": 2}), lambda _: None)
    metadata: Any = FileSystemReader(tmp_path / "iter_0000001").read_metadata()
    assert tuple(metadata.state_dict_metadata["decoder.layers.2.mlp.linear_fc1.weight"].size) == (6, 2)


@pytest.mark.parametrize("target", ["dcp", "deepspeed-universal", "megatron"])
def test_a_conversion_goes_on_where_it_was_broken_off(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_BATCH", 1)  # every file is flushed and noted at once
    write = import_module(WRITERS[target]).write
    names = {"a": "decoder.layers.0.mlp.linear_fc1.weight", "b.weight": "decoder.layers.1.mlp.linear_fc1.weight"}
    arrays = {
        f"{name}|{state}": np.random.default_rng(number).standard_normal((8, 4)).astype(np.float32)
        for number, name in enumerate(names.values())
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }
    source = Arrays(arrays, [Group(tuple(names.values()), {"lr": 0.1})], iteration=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    write(source, whole, WriteOptions(), lambda _: None)
    source.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        write(source, broken, WriteOptions(journal=Journal(broken, "same")), lambda _: None)
    journal = Journal(broken, "same")
    assert journal.resume(), "nothing was noted before the break"
    kept = {path: path.stat().st_mtime_ns for path in broken.rglob("*") if journal.done(str(path.relative_to(broken)))}
    assert kept
    source.fail_after = -1
    write(source, broken, WriteOptions(journal=journal), lambda _: None)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished file was written again"
    for path in whole.rglob("*"):
        if path.is_file():
            assert (broken / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_a_killed_command_leaves_no_output_and_its_successor_ends_well(tmp_path: Path) -> None:
    source, target = unpacked("ds") / "z3_dp4_fp32" / "ckpt", tmp_path / "out"
    line = [*RINGHOLD, "ckpt", "convert", str(source), str(target), "--to", "deepspeed-universal", "--json"]
    for _ in range(20):  # on a busy machine it may be done before we look
        child = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not any(tmp_path.iterdir()) and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        if child.wait() == -signal.SIGKILL and not target.exists():
            break
        shutil.rmtree(target)
    else:
        pytest.fail("no kill was in time")
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["to"] == "deepspeed-universal"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    a, b = open_source(source), open_source(target)
    assert compare(a, b).equal
    a.close()
    b.close()
