"""`ringhold ckpt diff`: what differs is found, counted and measured, and what is merely stored otherwise is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from checkpoint.compare import compare
from checkpoint.convert import convert
from checkpoint.formats.detect import open_source
from launch.ckpt import command
from tests.harness.checkpoints import unpacked


def diff(*arguments: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(command, ["diff", *map(str, arguments)])
    return found.exit_code, found.output


def written(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one = np.linspace(-2, 2, 10, dtype=np.float32).reshape(2, 5)
    other = one.copy()
    other[1, 4] += 0.5
    other[0, 0] -= 1.0
    same = np.arange(3)
    return (
        written(tmp_path / "a.safetensors", w=one, same=same, gone=same),
        written(tmp_path / "b.safetensors", w=other, same=same, new=same),
    )


def test_differences_are_counted_and_measured(pair: tuple[Path, Path]) -> None:
    code, text = diff(*pair, "--json")
    found = json.loads(text)
    assert (code, found["equal"], found["compared"]) == (1, False, 2)
    rows = {row["key"].split("|")[0]: row for row in found["differences"]}
    assert rows.keys() == {"w", "gone", "new"}
    assert (rows["gone"]["kind"], rows["new"]["kind"]) == ("only in A", "only in B")
    assert (rows["w"]["kind"], rows["w"]["count"], rows["w"]["elements"]) == ("values", 2, 10)
    assert rows["w"]["max_abs"] == 1.0
    assert rows["w"]["max_rel"] == pytest.approx(1 / 3)


def test_a_tolerance_forgives_what_is_small(pair: tuple[Path, Path]) -> None:
    (row,) = (row for row in json.loads(diff(*pair, "--json", "--tolerance", "0.3")[1])["differences"] if row["count"])
    assert row["count"] == 1, "1.0 of 3.0 is more than 0.3, 0.5 of 2.5 is less"
    code, text = diff(*pair, "--tolerance", "0.4", "--json")
    assert code == 1
    assert not any(row["kind"] == "values" for row in json.loads(text)["differences"])
    assert diff(*pair, "--tolerance", "-1")[0] != 0


def test_bits_count_where_there_is_no_tolerance(tmp_path: Path) -> None:
    a = written(tmp_path / "a.safetensors", w=np.array([0.0, np.nan], np.float32))
    b = written(tmp_path / "b.safetensors", w=np.array([-0.0, np.nan], np.float32))
    assert diff(a, a)[0] == 0
    assert diff(a, b)[0] == 1
    assert diff(a, b, "--tolerance", "0")[0] == 0
    c = written(tmp_path / "c.safetensors", w=np.array([0.0, 1.0], np.float32))
    (row,) = json.loads(diff(a, c, "--json")[1])["differences"]
    assert row["max_abs"] == "inf", "a NaN is infinitely far from a number"


def test_shapes_and_dtypes_differ(tmp_path: Path) -> None:
    a = written(tmp_path / "a.safetensors", w=np.zeros((2, 3), np.float32), v=np.zeros(2, np.float32))
    b = written(tmp_path / "b.safetensors", w=np.zeros((3, 2), np.float32), v=np.zeros(2, np.float16))
    found = {row["key"].split("|")[0]: row for row in json.loads(diff(a, b, "--json")[1])["differences"]}
    assert (found["w"]["kind"], found["w"]["detail"]) == ("shape", "[2, 3] and [3, 2]")
    assert (found["v"]["kind"], found["v"]["detail"]) == ("dtype", "F32 and F16")
    kinds = [row["kind"] for row in json.loads(diff(a, b, "--json", "--tolerance", "0")[1])["differences"]]
    assert kinds == ["shape"]


def test_formats_and_layouts_do_not_matter_and_groups_do(tmp_path: Path) -> None:
    folder = unpacked("ds") / "z1_dp2_bf16"
    convert(folder / "ckpt", tmp_path / "dcp", to="dcp")
    code, text = diff(folder / "ckpt", tmp_path / "dcp")
    assert (code, "are equal" in text) == (0, True)
    assert diff(unpacked("ds") / "z1_dp2_fp32" / "ckpt", unpacked("ds") / "z3_dp2_fp32" / "ckpt")[0] == 0
    one, other = open_source(folder / "ckpt"), open_source(tmp_path / "dcp")
    (group,) = other.groups
    changed = dict(group.options) | {"weight_decay": 0.5}
    object.__setattr__(group, "options", changed)
    found = compare(one, other)
    assert (found.equal, found.groups) == (False, ("group 0: weight_decay is 0.01 in A, 0.5 in B",))
    one.close()
    other.close()


def test_another_run_differs_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    code, text = diff(unpacked("fsdp") / "dp2" / "dcp", unpacked("fsdp") / "dp4" / "dcp")
    assert (code, "differ in" in text) == (1, True)
    found = CliRunner().invoke(command, ["diff", str(tmp_path / "nothing"), str(tmp_path)])
    assert "nothing does not exist" in str(found.exception)
