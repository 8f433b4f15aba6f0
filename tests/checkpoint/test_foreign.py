"""What is written for another library is loaded by that library, and trains on as if there had been no break.

One launch proves several things, since starting one of these libraries takes seconds.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from checkpoint.convert import convert
from tests.harness.checkpoints import VOCABULARY, unpacked
from tests.harness.foreign import FOREIGN, RINGHOLD, run

pytestmark = pytest.mark.timeout(500)
GENERATORS = "tests.fixtures.generators"


def commands(folder: Path, steps: list[tuple[Path, Path, str, list[str]]]) -> Path:
    """A file of conversions, for the script to run between saving and loading."""
    path = folder / "commands.json"
    rows = [[*RINGHOLD, "ckpt", "convert", str(a), str(b), "--to", to, *more] for a, b, to, more in steps]
    path.write_text(json.dumps(rows))
    return path


def test_fsdp2_goes_on_from_every_way_through_the_formats(tmp_path: Path) -> None:
    saved, cut, universal, back, store, again = (
        tmp_path / name for name in ["saved", "cut", "universal", "back", "store", "again"]
    )
    steps: list[tuple[Path, Path, str, list[str]]] = [
        (saved, cut, "dcp", ["--layout", "dp=3"]),
        (saved, universal, "deepspeed-universal", []),
        (universal, back, "dcp", []),
        (saved, store, "ringhold", []),
        (store, again, "dcp", ["--layout", "dp=2"]),
    ]
    found = run(
        sys.executable,
        *(f"{GENERATORS}.continue_fsdp", "--groups", "--save", saved, "--then", commands(tmp_path, steps)),
        *(cut, back, again),
        ranks=2,
    )
    assert len(found["folders"]) == 3
    for folder, one in found["folders"].items():
        assert one == {"loss": found["losses"][-1], "differs": []}, folder


def test_deepspeed_goes_on_under_any_stage_with_groups_and_frozen_parameters(tmp_path: Path) -> None:
    saved, universal, dcp, back = (tmp_path / name for name in ["saved", "universal", "dcp", "back"])
    steps: list[tuple[Path, Path, str, list[str]]] = [
        (saved, universal, "deepspeed-universal", []),
        (saved, dcp, "dcp", ["--layout", "dp=4"]),
        (dcp, back, "deepspeed-universal", []),
    ]
    found = run(
        FOREIGN,
        *(f"{GENERATORS}.continue_deepspeed", "--stage", "3", "--groups", "--freeze"),
        *("--save", saved, "--then", commands(tmp_path, steps), f"{universal}:3", f"{universal}:1", f"{back}:2"),
        ranks=2,
    )
    assert len(found["folders"]) == 3
    for folder, one in found["folders"].items():
        assert one == {"loss": found["losses"][-1], "differs": {}}, folder


def test_megatron_loads_what_was_written_for_another_layout(tmp_path: Path) -> None:
    cases: tuple[tuple[str, str, dict[str, int], int, str | None], ...] = (
        ("tp2pp2", "torch_dist", {"tp": 4, "pp": 2}, 2, None),
        ("tp2dp2_distopt", "torch", {}, 1, "param"),
        ("tp2pp2_gqa_swiglu", "torch", {"tp": 2}, 1, "fp32_param"),
        ("ep2_moe4", "torch_dist", {"ep": 4, "pp": 2}, 1, None),
    )
    wanted = []
    for name, form, layout, tp, masters in cases:
        folder = unpacked("mcore") / name
        convert(folder / form, tmp_path / name, to="megatron", layout=layout)
        row = {"truth": folder / "truth.safetensors", "folder": tmp_path / name, "tp": tp, "masters": masters}
        wanted.append({**row, "rows": VOCABULARY})
    (tmp_path / "wanted.json").write_text(json.dumps(wanted, default=str))
    found = run(FOREIGN, f"{GENERATORS}.load_megatron", tmp_path / "wanted.json")
    for case, one in zip(cases, found, strict=True):
        assert one["differs"] == [], case
        assert one["iteration"] == 3
        assert one["compared"] > 150
    plain, distributed, _, experts = (one["optimizer"] for one in found)
    assert plain["state"]["common_step"] == 3.0
    assert [group["wd_mult"] for group in plain["param_groups"]] == [1.0, 0.0]
    assert distributed["param_state_sharding_type"] == "fully_reshardable"
    assert [group["step"] for group in distributed["optimizer"]["param_groups"]] == [3.0, 3.0]
    assert [group["is_expert_parallel"] for group in experts["1"]["param_groups"]] == [True] * len(
        experts["1"]["param_groups"]
    )


def test_safetensors_loads_what_was_written_for_hugging_face(tmp_path: Path) -> None:
    folder = unpacked("ds") / "z1_dp2_bf16"
    convert(folder / "ckpt", tmp_path / "hf", to="hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["lm_head.weight"] == "wte.weight"
    truth = load_file(folder / "truth.safetensors")
    names = set()
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "hf" / file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                names.add(name)
                wanted = truth.get(f"{name}|fp32")
                assert wanted is None or np.array_equal(opened.get_tensor(name), wanted)
    assert names == {key.rsplit("|", 1)[0] for key in truth} | {"pos_ids"}
