"""Megatron's legacy layout made by hand: 16-bit parameters with masters, interleaved stages, untied output, experts."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.formats.detect import open_source
from checkpoint.formats.megatron_model import grouped
from checkpoint.language import PatternMissing, Spec
from checkpoint.source import Source
from collectives.errors import RingholdError
from collectives.region import Region

WIDTH, FFN, ROWS, PADDED = 8, 12, 13, 16
LAYER = {
    "input_layernorm.weight": (WIDTH,),
    "self_attention.linear_proj.weight": (WIDTH, WIDTH),
    "self_attention.linear_qkv.weight": (3 * WIDTH, WIDTH),
    "self_attention.linear_qkv.bias": (3 * WIDTH,),
    "mlp.linear_fc1.weight": (2 * FFN, WIDTH),
    "mlp.linear_fc2.weight": (WIDTH, FFN),
}


def whole_model(layers: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (PADDED, WIDTH)}
    shapes |= {f"decoder.layers.{n}.{name}": shape for n in range(layers) for name, shape in LAYER.items()}
    shapes |= {"decoder.final_layernorm.weight": (WIDTH,), "output_layer.weight": (PADDED, WIDTH)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shard(name: str, tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    if "linear_fc1" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(tp, 1)[rank].contiguous()
    return tensor.chunk(tp)[rank].contiguous() if "layernorm" not in name else tensor


def write(folder: Path, tp: int, pp: int, vpp: int, layers: int) -> dict[str, dict[str, torch.Tensor]]:
    """Write it and return masters and moments whole: by state, then name."""
    whole = {"fp32": whole_model(layers)}
    whole |= {
        state: {n: t * factor for n, t in whole["fp32"].items()}
        for state, factor in (("exp_avg", 3), ("exp_avg_sq", 5))
    }
    args = argparse.Namespace(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_layers=layers, vocab_size=ROWS,
        swiglu=True, untie_embeddings_and_output_weights=True, num_attention_heads=2,
    )  # fmt: skip
    each = layers // pp // vpp
    for rank in range(tp):
        for stage in range(pp):
            place = folder / "iter_0000009" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            place.mkdir(parents=True)
            chunks: list[dict[str, str]] = []  # own name -> name in the whole model
            for chunk in range(vpp):
                first = (chunk * pp + stage) * each
                own = {f"decoder.layers.{n}.{m}": f"decoder.layers.{first + n}.{m}" for n in range(each) for m in LAYER}
                if stage == 0 and chunk == 0:
                    own = {"embedding.word_embeddings.weight": "embedding.word_embeddings.weight"} | own
                if stage == pp - 1 and chunk == vpp - 1:
                    own |= {n: n for n in ("decoder.final_layernorm.weight", "output_layer.weight")}
                chunks.append(own)
            names = [name for own in chunks for name in own.values()]
            local = {s: {n: shard(n, row[n], rank, tp) for n in names} for s, row in whole.items()}
            matrices = [n for n in names if whole["fp32"][n].dim() > 1 and not n.endswith("bias")]
            groups = [matrices, [n for n in names if n not in matrices]]
            value: dict[str, Any] = {"args": args, "iteration": 9, "checkpoint_version": 3.0}
            for index, own in enumerate(chunks):
                rows = {mine: local["fp32"][name].bfloat16() for mine, name in own.items()}
                value["model" if vpp == 1 else f"model{index}"] = rows | {"decoder.layers.0.x._extra_state": None}
            value["optimizer"] = optimizer(groups, local)
            torch.save(value, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("9")
    return whole


def optimizer(groups: list[list[str]], local: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    rows, state, at = [], {}, 0
    for names, factor in zip(groups, (1.0, 0.0), strict=True):
        rows.append(
            {"lr": 1e-3, "weight_decay": 0.1 * factor, "wd_mult": factor, "params": list(range(at, at + len(names)))}
        )
        for name in names:
            state[at] = {"exp_avg": local["exp_avg"][name], "exp_avg_sq": local["exp_avg_sq"][name], "step": 9}
            at += 1
    return {
        "optimizer": {"state": state, "param_groups": rows},
        "fp32_from_fp16_params": [[local["fp32"][name] for name in names] for names in groups],
    }


def read(source: Source, key: str) -> torch.Tensor:
    entry = source.entries[key]
    raw = torch.from_numpy(source.read(key, Region.whole(entry.shape)))
    return raw.view(torch.float32 if entry.dtype == "F32" else torch.bfloat16).reshape(entry.shape)


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 2, 1), (2, 2, 2), (4, 1, 1)])
def test_masters_stages_and_an_untied_output(tmp_path: Path, tp: int, pp: int, vpp: int) -> None:
    whole = write(tmp_path, tp, pp, vpp, 4)
    source = open_source(tmp_path)
    assert source.format == "megatron-legacy"
    assert {entry.name for entry in source.entries.values()} == set(whole["fp32"])
    for state, row in whole.items():
        for name, tensor in row.items():
            expected = tensor[:ROWS] if tensor.shape[0] == PADDED else tensor
            assert torch.equal(read(source, f"{name}|{state}"), expected), (name, state)
            if state == "fp32":
                assert torch.equal(read(source, f"{name}|param"), expected.bfloat16())
    assert float(read(source, "output_layer.weight|step")) == 9
    assert [round(group.options["weight_decay"], 3) for group in source.groups] == [0.1, 0.0]
    assert sum(len(group.names) for group in source.groups) == len(whole["fp32"])
    assert source.extras["tied"] == []
    source.close()


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    import shutil

    write(tmp_path, 2, 2, 1, 4)
    shutil.rmtree(tmp_path / "iter_0000009" / "mp_rank_01_001")
    with pytest.raises(RingholdError, match=r"no files of the ranks .*\(1, 1, 0\)") as error:
        open_source(tmp_path)
    assert error.value.exit_code == 4


def test_a_spec_comes_before_megatrons_own(tmp_path: Path) -> None:
    write(tmp_path, 2, 1, 1, 2)
    spec = Spec.parse("[[pattern]]\nmatch = '.*linear_fc2.weight'\nhow = 'average'")
    source = open_source(tmp_path, spec=spec)
    assert source.entries["decoder.layers.0.mlp.linear_fc2.weight|fp32"].shape == (WIDTH, FFN // 2)
    source.close()


def test_groups_by_megatrons_rules() -> None:
    options = [
        {"wd_mult": 1.0, "is_expert_parallel": False},
        {"wd_mult": 0.0, "is_expert_parallel": False},
        {"wd_mult": 1.0, "is_expert_parallel": True},
    ]
    expert = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"
    shapes = {"a.weight": (2, 2), "a.bias": (2,), "norm.weight": (2,), expert: (4, 2)}
    assert grouped(options, shapes) == [["a.weight"], ["a.bias", "norm.weight"], [expert]]
    assert grouped([{"lr": 1.0}], shapes) == [list(shapes)]
    with pytest.raises(PatternMissing, match="do not tell which of groups"):
        grouped([{"wd_mult": 1.0, "lr": 1.0}, {"wd_mult": 1.0, "lr": 2.0}], shapes)
