"""Every real checkpoint reads as the library that wrote it says, bit by bit, model and optimizer."""

from pathlib import Path

import pytest

from checkpoint.formats.detect import open_source
from checkpoint.language import Spec
from checkpoint.renaming import Renamed
from checkpoint.source import Source, states_by_name
from collectives.region import Region
from tests.harness.checkpoints import VOCABULARY, differences, safetensors, unpacked

DEEPSPEED = (
    "moe_ep2dp2_z1", "pp2dp2_z1", "tp2dp2_z1", "z1_dp2_bf16", "z1_dp2_fp32", "z1_dp4_fp32", "z2_dp2_fp32",
    "z2_dp4_fp32", "z3_dp2_bf16", "z3_dp2_fp32", "z3_dp4_fp32",
)  # fmt: skip
FSDP = ("dp2", "dp4", "dp4_flatten", "fsdp2xtp2")
MEGATRON = ("tp2pp2", "tp2dp2_distopt", "tp2pp2_gqa_swiglu", "ep2_moe4")
MORE = {"z3_groups_frozen_subgroups": (9, 17)}


def check(path: Path, truth: Path, form: str, rows: int | None = None) -> Source:
    source = open_source(path)
    assert source.format == form
    assert differences(source, safetensors(truth), rows) == []
    stepped = [entry.name for entry in source.entries.values() if entry.state == "exp_avg"]
    assert sorted(name for group in source.groups for name in group.names) == sorted(stepped)
    steps = [
        source.read(entry.key, Region.whole(entry.shape)) for entry in source.entries.values() if entry.state == "step"
    ]
    assert len(steps) == len(stepped)
    assert {float(step.view("<f4")[0]) for step in steps} == {3.0}
    return source


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(name: str) -> None:
    folder = unpacked("ds") / name
    source = check(folder / "ckpt", folder / "truth.safetensors", "deepspeed")
    assert source.extras["iteration"] == 3
    assert all(group.options["weight_decay"] == 0.01 and group.options["lr"] == 0.01 for group in source.groups)
    source.close()


@pytest.mark.parametrize("name", [name for name in DEEPSPEED if not name.startswith("moe")])
def test_deepspeed_universal(name: str) -> None:
    folder = unpacked("ds") / name
    source = check(folder / "universal", folder / "truth.safetensors", "deepspeed-universal")
    buffers = [entry for entry in source.entries.values() if entry.name == "pos_ids"]
    assert [entry.dtype for entry in buffers] == ([] if name.startswith("pp") else ["I64"])
    source.close()


def test_deepspeed_names_tied_and_16_bit_parameters() -> None:
    source = open_source(unpacked("ds") / "z1_dp2_bf16" / "ckpt")
    assert source.extras["tied"] == [["wte.weight", "lm_head.weight"]]
    assert source.entries["wte.weight|param"].dtype == "BF16"
    assert source.entries["pos_ids|param"].dtype == "I64"
    source.close()


@pytest.mark.parametrize("name", list(MORE))
def test_deepspeed_groups_and_frozen_parameters(name: str) -> None:
    folder = unpacked("more") / name
    source = check(folder / "ckpt", folder / "truth.safetensors", "deepspeed")
    decays = {group.options["weight_decay"]: len(group.names) for group in source.groups}
    assert decays == dict(zip((0.1, 0.0), MORE[name], strict=True))
    frozen = {entry.name for entry in source.entries.values() if entry.state == "frozen"}
    assert frozen == {"wpe.weight", "blocks.0.ln_1.bias"}
    source.close()


@pytest.mark.parametrize("name", FSDP)
def test_dcp(name: str) -> None:
    folder = unpacked("fsdp") / name
    source = check(folder / "dcp", folder / "truth.safetensors", "dcp")
    assert source.extras["iteration"] == 3
    assert source.extras["scheduler"] == {"last_epoch": 3, "base_lrs": [0.01]}
    assert source.extras["tied"] == [["wte.weight", "lm_head.weight"]]
    assert [group.options["betas"] for group in source.groups] == [[0.9, 0.95]]
    source.close()


def test_dcp_through_zstd() -> None:
    folder = unpacked("fsdp") / "dp2_zstd_and_hf"
    check(folder / "dcp_zstd", folder / "truth.safetensors", "dcp").close()


@pytest.mark.parametrize("where", ["dcp_hf", "dcp_hf/sharded"])
def test_hf_files_that_dcp_wrote(where: str) -> None:
    folder = unpacked("fsdp") / "dp2_zstd_and_hf"
    truth = {
        key.replace("|fp32", "|param"): tensor for key, tensor in safetensors(folder / "truth.safetensors").items()
    }
    source = open_source(folder / where)
    assert len(source.entries) == 28
    assert differences(source, {key: truth[key] for key in source.entries}) == []
    source.close()


@pytest.mark.parametrize("name", MEGATRON)
@pytest.mark.parametrize("layout", ["torch_dist", "torch"])
def test_megatron(name: str, layout: str) -> None:
    folder = unpacked("mcore") / name
    form = "megatron" if layout == "torch_dist" else "megatron-legacy"
    source = check(folder / layout, folder / "truth.safetensors", form, VOCABULARY)
    assert source.entries["embedding.word_embeddings.weight|fp32"].shape[0] == VOCABULARY
    assert source.extras["tied"] == [["embedding.word_embeddings.weight", "output_layer.weight"]]
    decays = [group for group in source.groups if group.options["wd_mult"]]
    assert all(not name.endswith("bias") for group in decays for name in group.names if "experts" not in name)
    assert source.extras["args"]["num_layers"] == 4
    source.close()


def test_both_layouts_of_megatron_agree() -> None:
    folder = unpacked("mcore") / "tp2pp2_gqa_swiglu"
    dist, legacy = open_source(folder / "torch_dist"), open_source(folder / "torch")
    assert set(dist.entries) == set(legacy.entries)
    assert {g.names and tuple(sorted(g.names)) for g in dist.groups} == {tuple(sorted(g.names)) for g in legacy.groups}
    for key, entry in dist.entries.items():
        assert (dist.read(key, Region.whole(entry.shape)) == legacy.read(key, Region.whole(entry.shape))).all(), key
    dist.close()
    legacy.close()


@pytest.mark.parametrize("name", ["tied_fp32_40KB", "untied_bf16_30KB"])
def test_hf(name: str) -> None:
    folder = unpacked("hf")
    source = open_source(folder / name)
    truth = safetensors(folder / f"{name}.truth.safetensors")
    assert source.format == "hf"
    assert differences(source, truth) == []
    assert set(source.entries) == set(truth)
    source.close()


def test_megatron_under_the_names_of_llama() -> None:
    """Q, K and V of grouped queries, gate and up, against numpy on the truth."""
    import numpy as np

    folder = unpacked("mcore") / "tp2pp2_gqa_swiglu"
    truth = safetensors(folder / "truth.safetensors")
    source = Renamed(open_source(folder / "torch_dist"), Spec.built_in("megatron-gpt-to-hf-llama"))

    def array(key: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        return np.frombuffer(truth[key].data, "<f4").reshape(truth[key].shape)

    def read(key: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        entry = source.entries[key]
        found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = source.read(key, Region.whole(entry.shape)).view(
            "<f4"
        )
        return found.reshape(entry.shape)

    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        for layer in range(4):
            qkv = array(f"decoder.layers.{layer}.self_attention.linear_qkv.weight|{state}").reshape(2, 5, 8, 48)
            parts = {"q_proj": qkv[:, :3], "k_proj": qkv[:, 3:4], "v_proj": qkv[:, 4:]}
            for name, part in parts.items():
                got = read(f"model.layers.{layer}.self_attn.{name}.weight|{state}")
                assert np.array_equal(got, part.reshape(-1, 48)), name
            gate, up = np.split(array(f"decoder.layers.{layer}.mlp.linear_fc1.weight|{state}"), 2)
            assert np.array_equal(read(f"model.layers.{layer}.mlp.gate_proj.weight|{state}"), gate)
            assert np.array_equal(read(f"model.layers.{layer}.mlp.up_proj.weight|{state}"), up)
    assert ["model.embed_tokens.weight", "lm_head.weight"] in source.extras["tied"]
    assert "model.layers.3.self_attn.k_proj.bias" in {name for group in source.groups for name in group.names}
    assert set(states_by_name(source)) >= {"model.norm.weight", "model.layers.0.post_attention_layernorm.weight"}
    source.close()
