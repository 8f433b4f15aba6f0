"""`ringhold ckpt convert` and its engine: whole or not at all, resumed, refused clearly, without torch."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.convert import JOURNAL, Journal, convert
from checkpoint.formats.detect import open_source
from checkpoint.language import Spec
from checkpoint.selection import Selection
from collectives.errors import RingholdError, StorageFailed, UsageError
from launch import cli, console
from tests.harness.checkpoints import Tensor, differences, safetensors, unpacked

ROOT = Path(__file__).resolve().parent.parent.parent


Ringhold = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ringhold(capsys: pytest.CaptureFixture[str]) -> Ringhold:
    """Run `ringhold ckpt ...` and return its exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = console.run(cli.ringhold, ["ckpt", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


def z1() -> Path:
    return unpacked("ds") / "z1_dp2_bf16"


def truth() -> dict[str, Tensor]:
    return safetensors(z1() / "truth.safetensors")


def test_to_one_plain_file(tmp_path: Path) -> None:
    out = tmp_path / "plain.safetensors"
    report = convert(z1() / "ckpt", out, to="plain")
    found = safetensors(out)
    assert {key: found[key] for key in truth()} == truth()
    assert report.tensors == len(found)
    assert report.nbytes == sum(len(tensor.data) for tensor in found.values())
    assert list(tmp_path.iterdir()) == [out]
    again = open_source(out)
    assert differences(again, truth()) == []
    assert [len(group.names) for group in again.groups] == [28]
    assert again.groups[0].options["betas"] == [0.9, 0.95]
    assert again.extras["iteration"] == 3
    assert again.extras["tied"] == [["wte.weight", "lm_head.weight"]]
    again.close()


def test_safetensors_itself_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    convert(z1() / "ckpt", tmp_path / "out", to="plain")
    found = load_file(tmp_path / "out")
    assert found["wte.weight|fp32"].shape == (131, 42)
    assert found["pos_ids|param"].tolist() == list(range(33))


def test_to_hugging_face_with_ties_left_out(tmp_path: Path) -> None:
    convert(z1() / "ckpt", tmp_path / "hf", to="hf")
    found = safetensors(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in found
    assert found["wte.weight"] == truth()["wte.weight|fp32"]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["lm_head.weight"] == "wte.weight"
    assert set(index["weight_map"]) == set(found)
    source = open_source(tmp_path / "hf")
    assert source.entries["lm_head.weight|param"].shape == (131, 42)
    source.close()


def test_shards_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.formats.write_hf.SHARD_BYTES", 40_000)
    convert(z1() / "ckpt", tmp_path / "hf", to="hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 45_000 for file in files)
    source = open_source(tmp_path / "hf")
    weights = {key.replace("|fp32", "|param"): value for key, value in truth().items() if key.endswith("|fp32")}
    assert differences(source, weights) == []
    source.close()


def test_to_a_store_and_back(tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert(z1() / "ckpt", store, to="ringhold")
    source = open_source(store)
    assert source.format == "ringhold"
    assert differences(source, truth()) == []
    original = open_source(z1() / "ckpt")
    assert set(source.entries) == set(original.entries)
    assert [(g.names, g.options) for g in source.groups] == [(g.names, g.options) for g in original.groups]
    assert source.extras["tied"] == original.extras["tied"]
    source.close()
    original.close()
    with pytest.raises(UsageError, match="has a step 3 already"):
        convert(unpacked("fsdp") / "dp2" / "dcp", store, to="ringhold")
    convert(f"{store}@3", tmp_path / "plain", to="plain")
    assert safetensors(tmp_path / "plain")["wte.weight|fp32"] == truth()["wte.weight|fp32"]


def odd_state() -> dict[str, Any]:
    import torch

    return {
        "model": {"w": torch.randn(5, 7), "half": torch.randn(3).bfloat16(), "double": torch.randn(2, 2).double()},
        "optimizer": {
            "state": {"w": {"exp_avg": torch.randn(5, 7), "step": torch.tensor(4.0)}},
            "param_groups": [{"params": ["w"], "betas": (0.9, 0.95), "lr": 1e-3}],
        },
        "rng": torch.arange(40, dtype=torch.uint8),
        "big": {"table": torch.randn(200, 200)},
        "position": {"epoch": 3, "shards": [1, 2], "name": b"raw"},
    }


def test_a_step_of_a_store_goes_to_another_store_as_it_is(tmp_path: Path) -> None:
    from checkpoint import load_state, save
    from collectives.state import state_hash

    save(str(tmp_path / "a"), odd_state(), step=12, metadata={"note": "kept"})
    convert(tmp_path / "a", tmp_path / "b", to="ringhold")
    assert state_hash(load_state(str(tmp_path / "a"))) == state_hash(load_state(str(tmp_path / "b")))
    source = open_source(tmp_path / "b")
    assert source.extras["iteration"] == 12
    source.close()


def test_tensors_outside_of_the_model_are_extras_or_told(tmp_path: Path) -> None:
    from checkpoint import save

    save(str(tmp_path / "a"), odd_state(), step=12)
    report = convert(tmp_path / "a", tmp_path / "out", to="plain")
    assert report.left_out == ("big/table",)
    found = safetensors(tmp_path / "out")
    assert set(found) == {"w|fp32", "half|param", "double|param", "w|exp_avg", "w|step"}
    again = open_source(tmp_path / "out")
    assert again.extras["rng"]["shape"] == [40]
    assert again.extras["position"]["epoch"] == 3
    again.close()
    save(str(tmp_path / "flat"), {"w": odd_state()["model"]["w"]}, step=1)
    convert(tmp_path / "flat", tmp_path / "flat-out", to="plain")
    assert set(safetensors(tmp_path / "flat-out")) == {"w|param"}


@pytest.mark.parametrize("to", ["plain", "hf", "ringhold"])
def test_a_layout_that_has_no_meaning_is_refused(tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match="leave out the layout"):
        convert(z1() / "ckpt", tmp_path / "out", to=to, layout={"tp": 2})


def test_selections_and_casts(tmp_path: Path) -> None:
    chosen = Selection(include=(r"^blocks\.0",), exclude=(r"bias$",), weights_only=True, dtype="BF16")
    convert(z1() / "ckpt", tmp_path / "out", to="plain", selection=chosen)
    found = safetensors(tmp_path / "out")
    assert all(key.startswith("blocks.0.") and key.endswith(".weight|param") for key in found)
    stored = open_source(z1() / "ckpt")  # its 16-bit parameters are its masters, rounded by torch
    assert differences(stored, found) == []
    stored.close()
    with pytest.raises(UsageError, match="no tensor is left"):
        convert(z1() / "ckpt", tmp_path / "none", to="plain", selection=Selection(include=("nothing",)))
    with pytest.raises(UsageError, match="weights are cast to one of"):
        convert(z1() / "ckpt", tmp_path / "none", to="plain", selection=Selection(dtype="I64"))
    assert not (tmp_path / "none").exists()


def test_groups_keep_only_what_is_selected(tmp_path: Path) -> None:
    convert(z1() / "ckpt", tmp_path / "out", to="plain", selection=Selection(exclude=("blocks",)))
    source = open_source(tmp_path / "out")
    assert set(source.groups[0].names) == {"odd7", "scale", "wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    source.close()


def test_ties_by_a_spec(tmp_path: Path) -> None:
    spec = Spec.parse("[[pattern]]\nmatch = 'wpe.weight'\nhow = 'tied'\nof = 'wte.weight'")
    convert(z1() / "ckpt", tmp_path / "out", to="plain", spec=spec)
    source = open_source(tmp_path / "out")
    assert not any(entry.name == "wpe.weight" for entry in source.entries.values())
    assert ["wte.weight", "wpe.weight"] in source.extras["tied"]
    source.close()


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = Path(shutil.copytree(z1() / "ckpt", tmp_path / "ckpt"))
    before = sorted(path.name for path in source.rglob("*"))
    for destination in (source, source / "out", tmp_path, source / ".." / "ckpt"):
        with pytest.raises(UsageError, match=r"lies within the other|exists"):
            convert(source, destination, to="plain")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError):
        convert(source, tmp_path / "link", to="hf")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        convert(source, tmp_path / "there", to="plain")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(UsageError, match="is no folder"):
        convert(source, tmp_path / "no" / "out", to="plain")
    with pytest.raises(UsageError, match="cannot convert to 'x'"):
        convert(source, tmp_path / "out", to="x")
    assert sorted(path.name for path in source.rglob("*")) == before


def test_a_damaged_source_leaves_nothing_behind(tmp_path: Path) -> None:
    source = Path(shutil.copytree(unpacked("fsdp") / "dp2" / "dcp", tmp_path / "dcp"))
    data = bytearray((source / "__1_0.distcp").read_bytes())
    (source / "__1_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(RingholdError) as error:
        convert(source, tmp_path / "out", to="plain")
    assert error.value.exit_code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


@pytest.mark.parametrize("to", ["plain", "hf", "ringhold", "deepspeed-universal"])
def test_a_flipped_bit_is_found_by_the_files_own_checksums(tmp_path: Path, to: str) -> None:
    source = Path(shutil.copytree(z1() / "ckpt", tmp_path / "ckpt"))
    victim = source / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    reader = open_source(source)
    place = reader.tensor("ln_f.weight|fp32")._runs[0][1]  # type: ignore[attr-defined]
    reader.close()
    assert place.file.path == victim
    data = bytearray(victim.read_bytes())
    data[place.offset + 5] ^= 1
    victim.write_bytes(data)
    with pytest.raises(RingholdError, match="does not have the checksum") as error:
        convert(source, tmp_path / "out", to=to)
    assert error.value.exit_code == 4
    out = tmp_path / "out"
    assert not out.exists() or (to == "ringhold" and not list(out.glob("steps/*.json")))


def test_files_without_checksums_are_taken_as_they_are(tmp_path: Path) -> None:
    import torch

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(
            {"module": {"w": torch.ones(3)}, "buffer_names": [], "optimizer": None},
            tmp_path / "mp_rank_00_model_states.pt",
        )
    finally:
        torch.serialization.set_crc32_options(before)
    convert(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", to="plain")
    assert (tmp_path.parent / f"{tmp_path.name}-out").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The limit on the size of files stands in for it: the kernel refuses a write in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageFailed, match="nothing was left behind") as error:
            convert(z1() / "ckpt", tmp_path / "out", to="plain")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(StorageFailed, match="bytes are needed and 1000 are free"):
        convert(z1() / "ckpt", tmp_path / "out", to="plain")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from checkpoint import convert
from checkpoint.formats import safetensors_file

safetensors_file._FLUSHED = 1 << 16
written = 0

def tell(nbytes):
    global written
    written += nbytes
    if written > 300_000:
        os.kill(os.getpid(), signal.SIGKILL)

convert.convert(sys.argv[1], sys.argv[2], to="plain", progress=lambda report: tell)
"""


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source, out = z1() / "ckpt", tmp_path / "out.safetensors"
    staging = tmp_path / f".{out.name}.ringhold-partial"
    child = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], cwd=ROOT, timeout=100, check=False)
    assert child.returncode == -signal.SIGKILL
    done = json.loads((staging / JOURNAL).read_text())["done"]
    assert 200_000 < done["state.safetensors"] < 400_000
    assert not out.exists()
    kept = staging / "state.safetensors"
    inode = kept.stat().st_ino
    with kept.open("r+b") as file:  # what is flushed is not read again: a mark in it survives
        file.seek(done["state.safetensors"] - 8)
        mark = file.read(8)[::-1]
        file.seek(-8, 1)
        file.write(mark)
    report = convert(source, out, to="plain")
    assert report.resumed
    assert out.stat().st_ino == inode
    assert not staging.exists()
    fresh = tmp_path / "fresh"
    convert(source, fresh, to="plain")
    at = done["state.safetensors"] - 8
    resumed, whole = out.read_bytes(), fresh.read_bytes()
    assert resumed[at : at + 8] == mark
    assert resumed[:at] + whole[at : at + 8] + resumed[at + 8 :] == whole


def test_two_conversions_to_one_place(tmp_path: Path) -> None:
    """The second is refused while the first is at work, which it does not disturb."""
    refused: list[str] = []

    def first_block(_nbytes: int) -> None:
        if not refused:
            with pytest.raises(UsageError, match=r"another conversion to .* is at work") as error:
                convert(unpacked("fsdp") / "dp2" / "dcp", tmp_path / "out", to="plain")
            refused.append(str(error.value))

    convert(z1() / "ckpt", tmp_path / "out", to="plain", progress=lambda _: first_block)
    assert len(refused) == 1
    assert safetensors(tmp_path / "out")["wte.weight|fp32"] == truth()["wte.weight|fp32"]


def test_parts_of_another_conversion_are_not_used(tmp_path: Path) -> None:
    staging = tmp_path / ".out.ringhold-partial"
    staging.mkdir()
    (staging / "state.safetensors").write_bytes(b"stale")
    journal = Journal(staging, "another conversion")
    journal.record("state.safetensors", 5)
    report = convert(z1() / "ckpt", tmp_path / "out", to="plain")
    assert not report.resumed
    assert safetensors(tmp_path / "out")["wte.weight|fp32"] == truth()["wte.weight|fp32"]


def test_the_command_never_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launch import cli, console\n"
        "status = console.run(cli.ringhold, sys.argv[1:])\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('torch', 'deepspeed', 'megatron')]\n"
        "sys.exit(status)"
    )
    cases = [
        ("ds/z3_dp2_bf16/ckpt", "deepspeed-universal"),
        ("mcore/tp2pp2/torch_dist", "ringhold"),
        ("fsdp/dp4/dcp", "hf"),
    ]
    for index, (name, to) in enumerate(cases):
        family, _, rest = name.partition("/")
        command = [
            sys.executable,
            "-c",
            code,
            "ckpt",
            "convert",
            str(unpacked(family) / rest),
            str(tmp_path / str(index)),
        ]
        done = subprocess.run(
            [*command, "--to", to], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_command_tells_what_it_did(tmp_path: Path, ringhold: Ringhold) -> None:
    code, out, _ = ringhold("convert", z1() / "ckpt", "--to", "hf", "--dry-run", "--json")
    assert (code, json.loads(out)["dry_run"]) == (0, True)
    code, out, errors = ringhold(
        "convert", z1() / "ckpt", tmp_path / "out", "--to", "plain", "--json", "--weights-only"
    )
    assert (code, errors) == (0, "")
    report = json.loads(out)
    assert (report["format"], report["tensors"], report["states"]) == ("deepspeed", 29, {"fp32": 28, "param": 1})
    code, out, _ = ringhold("convert", z1() / "ckpt", tmp_path / "two", "--to", "plain")
    assert code == 0
    assert "141 tensors" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{ckpt}", "--to", "plain"], 2, "give the destination"),
        (["{ckpt}", "{out}"], 2, "--to"),
        (["{ckpt}", "{out}", "--to", "nowhere"], 2, "nowhere"),
        (["{ckpt}", "{out}", "--to", "plain", "--layout", "tp"], 2, "--layout"),
        (["{ckpt}", "{out}", "--to", "plain", "--dtype", "int3"], 2, "--dtype"),
        (["{ckpt}", "{out}", "--to", "plain", "--include", "("], 2, "--include"),
        (["{ckpt}", "{out}", "--to", "plain", "--spec", "none"], 2, "no spec is called"),
        (["{ckpt}", "{out}", "--to", "hf", "--from", "dcp"], 4, ".metadata"),
        (["{none}", "{out}", "--to", "hf"], 4, "does not exist"),
        (["{evil}", "{out}", "--to", "hf"], 4, "nothing was executed"),
        (["{empty}", "{out}", "--to", "hf"], 4, "no checkpoint that Ringhold reads"),
    ],
)
def test_errors_of_the_command(
    tmp_path: Path, ringhold: Ringhold, arguments: list[str], code: int, message: str
) -> None:
    import pickle

    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (tmp_path / "evil").mkdir()
    (tmp_path / "empty").mkdir()
    torch.save({"module": Evil()}, tmp_path / "evil" / "mp_rank_00_model_states.pt", pickle_module=pickle)
    places = {name: str(tmp_path / name) for name in ("out", "none", "evil", "empty")} | {"ckpt": str(z1() / "ckpt")}
    found, out, errors = ringhold("convert", *(argument.format(**places) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "evil"]


def test_the_spec_command(tmp_path: Path, ringhold: Ringhold) -> None:
    _, out, _ = ringhold("spec", "--json")
    assert json.loads(out)["specs"] == ["dcp", "deepspeed", "hf", "megatron-gpt-to-hf-llama", "megatron"]
    _, out, _ = ringhold("spec", "megatron", "--show")
    (tmp_path / "mine.toml").write_text(out)
    _, out, _ = ringhold("spec", tmp_path / "mine.toml", "--json")
    assert json.loads(out)["patterns"] == 4
    real = unpacked("mcore") / "tp2pp2_gqa_swiglu" / "torch"
    _, out, _ = ringhold("spec", "megatron-gpt-to-hf-llama", real, "--json")
    rows = {row["name"]: row["becomes"] for row in json.loads(out)["parameters"]}
    assert len(rows["decoder.layers.2.self_attention.linear_qkv.weight"]) == 3
    rule = "[[pattern]]\nmatch = '{}'\nhow = 'replicated'\n"
    (tmp_path / "both.toml").write_text(rule.format(".*final_layernorm.*") + rule.format("decoder.*weight"))
    code, _, errors = ringhold("spec", tmp_path / "both.toml", real)
    assert code == 4
    assert "decoder.final_layernorm.weight: patterns '.*final_layernorm.*' and 'decoder.*weight'" in errors


@pytest.fixture(autouse=True)
def _no_staging_left(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], None]:
    def check() -> None:
        assert not list(tmp_path.glob(".*ringhold-partial*")), "a conversion left its staging folder"

    request.addfinalizer(check)
    return check
