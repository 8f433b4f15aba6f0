"""Checkpoints that the real ones lack: made by hand in the writers' layouts, with the truth known."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.formats.deepspeed_zero import expert_ranks
from checkpoint.formats.detect import open_source, resolved
from checkpoint.formats.megatron_model import buffer_layout
from checkpoint.language import PatternMissing, Spec
from checkpoint.lazy import PiecesMissing
from checkpoint.source import Source
from collectives.errors import RingholdError, UnknownFormat
from collectives.region import Region
from tests.harness import deepspeed_made as made
from tests.harness.checkpoints import VOCABULARY, differences, safetensors, unpacked

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
PARAMS = {"embed": (13, 5), "norm": (5,), "one": (1,), "odd": (7,), "deep": (2, 3, 5), "last": (5, 11)}
MODEL = made.Model(
    PARAMS,
    [(["embed", "deep", "last"], {**OPTIONS, "weight_decay": 0.1}), (["norm", "one", "odd"], {**OPTIONS, "lr": 0.5})],
    frozen={"still": (4, 3), "small": (1,)},
    buffers={"ids": torch.arange(9)},
    aliases={"head": "embed"},
)


def tensor(source: Source, key: str) -> torch.Tensor:
    entry = source.entries[key]
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "F16": torch.float16}
    raw = torch.from_numpy(source.read(key, Region.whole(entry.shape)))
    return raw.view(dtypes[entry.dtype]).reshape(entry.shape)


def assert_truth(source: Source, truth: made.Tensors) -> None:
    for key, wanted in truth.items():
        assert torch.equal(tensor(source, key), wanted), key


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("write", [made.zero12, made.zero3])
def test_zero_of_any_number_of_ranks(tmp_path: Path, dp: int, write: Callable[..., made.Tensors]) -> None:
    truth = write(tmp_path, MODEL, dp)
    source = open_source(tmp_path)
    assert_truth(source, truth)
    assert [(g.names, g.options["lr"]) for g in source.groups] == [
        (("embed", "deep", "last"), 1e-3),
        (("norm", "one", "odd"), 0.5),
    ]
    assert float(tensor(source, "one|step")) == 7
    assert source.extras["tied"] == [["embed", "head"]]
    assert tensor(source, "ids|param").tolist() == list(range(9))
    source.close()


def write_tensor_parallel(folder: Path, info: dict[str, Any] | None) -> tuple[made.Tensors, dict[str, Any]]:
    """Two tensor parallel ranks times two data parallel ones; shards cut by hand."""
    whole = {
        "embed.weight": (8, 4),
        "norm.weight": (4,),
        "mlp.dense.weight": (4, 6),
        "mlp.gate.weight": (8, 4),
        "scale": (3,),
    }
    model = made.Model(whole, [(list(whole), {**OPTIONS, "weight_decay": 0.1})])
    states = model.states()
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    for rank in range(2):
        shards: dict[str, made.Tensors] = {}
        for state, row in states.items():
            gate, up = row["mlp.gate.weight"].chunk(2)
            shards[state] = {
                "embed.weight": row["embed.weight"].chunk(2)[rank].contiguous(),
                "norm.weight": row["norm.weight"],
                "mlp.dense.weight": row["mlp.dense.weight"].chunk(2, 1)[rank].contiguous(),
                "mlp.gate.weight": torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]),
                "scale": row["scale"] + rank,
            }
        local = made.Model({n: tuple(t.shape) for n, t in shards["fp32"].items()}, model.groups)
        made.write_zero12(tag, local, shards, 2, rank, 7.0)
        value = {
            "module": shards["fp32"],
            "buffer_names": [],
            "param_shapes": [{n: t.shape for n, t in shards["fp32"].items()}],
            "shared_params": {},
            "global_steps": 7,
        }
        if info is not None:
            value["universal_checkpoint_info"] = info
        torch.save(value, tag / f"mp_rank_{rank:02d}_model_states.pt")
    truth = made.truth(model, states)
    truth |= {f"scale|{state}": (row["scale"] + (row["scale"] + 1)) / 2 for state, row in states.items()}
    truth |= {f"embed.weight|{state}": row["embed.weight"][:7] for state, row in states.items()}
    return truth, {}


INFO = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": 7,
    "vocabulary_parameter_patterns": ["embed"],
    "tp_replicated_parameter_patterns": [r".*norm"],
    "parameter_to_average_patterns": ["scale"],
    "parameter_with_row_parallelism_patterns": [r"mlp\.dense\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r"mlp\.gate"],
}
SPEC = """
[[pattern]]
match = '.*norm\\.weight'
how = "replicated"
[[pattern]]
match = 'scale'
how = "average"
[[pattern]]
match = 'mlp\\.dense\\.weight'
how = "fragment"
dim = 1
[[pattern]]
match = 'mlp\\.gate\\.weight'
how = "fragment"
parts = 2
[[pattern]]
match = 'embed\\.weight'
how = "fragment"
[[vocabulary]]
match = 'embed\\.weight'
rows = 7
"""


def test_tensor_parallel_by_the_checkpoints_own_lists(tmp_path: Path) -> None:
    truth, _ = write_tensor_parallel(tmp_path, INFO)
    source = open_source(tmp_path)
    assert_truth(source, truth)
    assert source.extras["layout"] == {"tp": 2, "pp": 1, "dp": 2}
    source.close()


def test_tensor_parallel_by_a_spec_where_the_checkpoint_has_no_lists(tmp_path: Path) -> None:
    truth, _ = write_tensor_parallel(tmp_path, None)
    with pytest.raises(PatternMissing, match=r"(?s)^embed\.weight: no pattern .* no default; add one with --spec"):
        open_source(tmp_path)
    source = open_source(tmp_path, spec=Spec.parse(SPEC))
    assert_truth(source, truth)
    source.close()


def test_experts_in_both_arrangements_of_ranks() -> None:
    class Address:
        def __init__(self, start: int, numel: int) -> None:
            self.start, self.numel = start, numel

    first, second = {"a": {"start": 0, "numel": 5}}, {"a": {"start": 0, "numel": 3}, "b": {"start": 3, "numel": 2}}
    assert expert_ranks([first, first, second, second], 2) == [[0, 2], [1, 3]]
    assert expert_ranks([first, second, first, second], 2) == [[0, 1], [2, 3]]
    assert expert_ranks([first, first, first, first], 2) == [[0, 2], [1, 3]]
    assert expert_ranks([first, second], 2) == [[0, 1]]


def write_without_zero(folder: Path, frozen: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """DeepSpeed without ZeRO: torch's optimizer, numbered."""
    folder.mkdir(exist_ok=True)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 5))
    named = dict(model.named_parameters())
    for name in frozen:
        named[name].requires_grad_(False)
    trained = [p for p in named.values() if p.requires_grad]
    groups = [[p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]]
    optimizer = torch.optim.AdamW(
        [{"params": row, "weight_decay": d} for row, d in zip(groups, (0.1, 0.0), strict=True)]
    )
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    module = {n: t.detach() for n, t in named.items()} | {"alias": named["0.weight"].detach()}
    value: dict[str, Any] = {
        "module": module,
        "buffer_names": [],
        "param_shapes": None,
        "global_steps": 1,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(value, folder / "mp_rank_00_model_states.pt")
    truth = {}
    for name, parameter in named.items():
        truth[f"{name}|{'fp32' if parameter.requires_grad else 'frozen'}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            truth[f"{name}|{key}"] = optimizer.state[parameter][key]
    return truth


def test_without_zero_names_follow_from_shapes(tmp_path: Path) -> None:
    truth = write_without_zero(tmp_path)
    source = open_source(tmp_path)
    assert_truth(source, truth)
    assert [(g.names, g.options["weight_decay"]) for g in source.groups] == [
        (("0.weight", "2.weight"), 0.1),
        (("0.bias", "1.weight", "1.bias", "2.bias"), 0.0),
    ]
    assert source.extras["tied"] == [["0.weight", "alias"]]
    source.close()


def test_without_zero_what_shapes_do_not_tell_is_refused_and_can_be_told(tmp_path: Path) -> None:
    truth = write_without_zero(tmp_path, ("1.bias",))
    with pytest.raises(PiecesMissing, match=r"(?s)do not tell which of them are frozen.*--spec"):
        open_source(tmp_path)
    spec = Spec.parse('[[pattern]]\nmatch = "1.bias"\naxis = "optimizer"\nhow = "frozen"')
    source = open_source(tmp_path, spec=spec)
    assert_truth(source, truth)
    source.close()


def test_buckets_of_the_distributed_optimizer() -> None:
    params = [("a", 100, False), ("b", 64, False), ("c", 7, False)]
    found, sizes = buffer_layout(params)
    assert {n: (a.bucket, a.start, a.stop) for n, a in found.items()} == {
        "c": (0, 0, 7),
        "b": (0, 64, 128),
        "a": (0, 128, 228),
    }
    assert sizes == [228]
    found, sizes = buffer_layout(params, bucket_size=100)
    assert sizes == [128, 100]
    assert buffer_layout(params, sizes=sizes) == (found, sizes)
    shared = [("embed", 10, True), ("a", 100, False), ("out", 10, True)]
    found, sizes = buffer_layout(shared)
    assert sizes == [10, 128, 10]
    assert [found[n].bucket for n in ("out", "a", "embed")] == [0, 1, 2]
    assert buffer_layout(shared, sizes=sizes) == (found, sizes)
    with pytest.raises(PiecesMissing, match="does not fit into bucket 0"):
        buffer_layout(params, sizes=[100])
    with pytest.raises(PiecesMissing, match=r"have .* elements, its parameters"):
        buffer_layout(params, sizes=[300])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_flat_buckets_of_megatron(tmp_path: Path) -> None:
    """A `dp_reshardable` checkpoint, made from the legacy one whose flat buffers Megatron wrote."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    real = unpacked("mcore") / "tp2dp2_distopt"
    iteration = "iter_0000003"
    target = tmp_path / iteration
    whole = FileSystemReader(str(real / "torch_dist" / iteration))
    rows = whole.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(row.size, dtype=row.properties.dtype)
        for key, row in rows.items()
        if isinstance(row, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    load(state, storage_reader=whole, no_dist=True)
    for rank in range(2):
        flat = torch.load(real / "torch" / iteration / f"mp_rank_{rank:02d}" / "distrib_optim.pt", weights_only=False)
        (row,) = flat[0].values()
        for key in ("param", "exp_avg", "exp_avg_sq"):
            place = f"dp_group_idx_{rank}.gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0.{key}"
            state[f"optimizer.distributed.{place}"] = row[key]
    save(state, storage_writer=FileSystemWriter(str(target)), no_dist=True)
    for name in ("common.pt", "metadata.json"):
        shutil.copy(real / "torch_dist" / iteration / name, target / name)
    source = open_source(target)
    assert differences(source, safetensors(real / "truth.safetensors"), VOCABULARY) == []
    source.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("prefixes", [("model", "optim"), ("app.net", "app.opt"), ("", "optimizer")])
def test_dcp_under_any_prefix_and_what_is_beside(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    model, optim = prefixes
    weights = {"_orig_mod.a.weight": torch.randn(4, 3), "b": torch.randn(2)}
    state: dict[str, Any] = {(f"{model}." if model else "") + name: t for name, t in weights.items()}
    state |= {f"{optim}.state.{name}.exp_avg": t * 2 for name, t in weights.items()}
    state |= {f"{optim}.param_groups.{name}.lr": 0.5 for name in weights}
    if model:
        state |= {"ema.small": torch.ones(3), "ema.large": torch.ones(200, 200)}
    save(state, storage_writer=FileSystemWriter(str(tmp_path / "dcp")), no_dist=True)
    source = open_source(tmp_path / "dcp")
    assert {entry.name for entry in source.entries.values()} == {"a.weight", "b"}
    assert torch.equal(tensor(source, "a.weight|exp_avg"), weights["_orig_mod.a.weight"] * 2)
    assert [(group.names, group.options) for group in source.groups] == [(("a.weight", "b"), {"lr": 0.5})]
    if model:
        assert source.extras["ema.small"]["shape"] == [3]
        assert source.extras["left_out"] == ["ema.large"]
    source.close()


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        family, _, rest = name.partition("/")
        return Path(shutil.copytree(unpacked(family) / rest, tmp_path / "copy"))

    return make


@pytest.mark.parametrize(
    ("name", "victim", "message"),
    [
        ("ds/z1_dp4_fp32/ckpt", "global_step3/zero_pp_rank_3_mp_rank_00_optim_states.pt", "written by 4 data parallel"),
        (
            "ds/z3_dp4_fp32/ckpt",
            "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
            r"ranks \[1\] .* are missing",
        ),
        ("ds/z3_dp4_fp32/ckpt", "global_step3/zero_pp_rank_2_mp_rank_00_model_states.pt", r"ranks \[2\] are missing"),
        ("mcore/tp2pp2/torch_dist", "iter_0000003/common.pt", r"common\.pt is missing"),
        ("ds/tp2dp2_z1/ckpt", "global_step3/mp_rank_01_model_states.pt", r"ranks \[1\] are missing"),
        ("ds/pp2dp2_z1/ckpt", "global_step3/zero_pp_rank_1_mp_rank_01_optim_states.pt", r"ranks \[1\] .* are missing"),
        ("fsdp/dp4/dcp", "__2_0.distcp", "No such file"),
        ("mcore/tp2pp2/torch_dist", "iter_0000003/__1_1.distcp", "No such file"),
        ("mcore/tp2pp2/torch", "iter_0000003/mp_rank_01_001/model_optim_rng.pt", "No such file"),
        ("hf/tied_fp32_40KB", "model-00003-of-00005.safetensors", "is missing"),
    ],
)
def test_a_missing_or_truncated_file_is_named(
    copy: Callable[[str], Path], name: str, victim: str, message: str
) -> None:
    folder = copy(name)
    data = (folder / victim).read_bytes()
    (folder / victim).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(RingholdError) as error:
        open_source(folder)
    assert error.value.exit_code == 4
    (folder / victim).unlink()
    with pytest.raises(RingholdError, match=message) as error:
        open_source(folder)
    assert error.value.exit_code == 4


def test_files_of_another_run_are_noticed(copy: Callable[[str], Path]) -> None:
    folder = copy("ds/z1_dp2_fp32/ckpt") / "global_step3"
    shutil.copy(
        folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    )
    with pytest.raises(RingholdError, match="written by 2 data parallel ranks, and the files of 3 are here"):
        open_source(folder.parent)


@pytest.mark.parametrize("tag", ["../../etc", "/etc", "..", ".", "", "none"])
def test_a_tag_that_leads_elsewhere(tmp_path: Path, tag: str) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(RingholdError) as error:
        resolved(tmp_path, None)
    assert error.value.exit_code == 4


def test_an_index_or_metadata_that_leads_elsewhere(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("hf/tied_fp32_40KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001-of', '"../model-00001-of'))
    with pytest.raises(RingholdError, match="nothing outside is read"):
        open_source(folder)
    dcp = Path(shutil.copytree(unpacked("fsdp") / "dp2" / "dcp", tmp_path / "dcp"))
    metadata = (dcp / ".metadata").read_bytes()
    (dcp / ".metadata").write_bytes(metadata.replace(b"__0_0.distcp", b"../0_0.distc"))
    with pytest.raises(RingholdError, match="nothing outside is read"):
        open_source(dcp)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat, match="no checkpoint that Ringhold reads"):
        open_source(tmp_path)
    with pytest.raises(RingholdError, match="does not exist"):
        open_source(tmp_path / "none")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RingholdError, match="not safetensors, or truncated"):
        open_source(tmp_path / "x.safetensors")


def test_large_models_have_about_the_size_asked_for() -> None:
    assert 450 < sum(12 * math.prod(s) for s in made.large(500).params.values()) / 2**20 < 550
