"""Training at scale on paper: parameters, FLOPs, pipelines, memory, predictions and the search among divisions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from collectives.errors import UsageError
from launch import console
from launch.cli import ringhold
from parallel.scale import Cluster, Strategy, Transformer, predict, search
from parallel.scale.files import names
from parallel.scale.kernels import Kernels
from parallel.scale.layer import Layers
from parallel.scale.memory import activations, peak
from parallel.scale.pipeline import makespan, split_layers
from parallel.scale.search import DoesNotFit, strategies

_SIZES = {
    "gpt3-175b": 175e9,
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.6e9,
    "llama3-405b": 405.8e9,
    "mixtral-8x7b": 46.7e9,
    "mixtral-8x22b": 140.6e9,
}
"""Parameters as their makers publish them."""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = console.run(ringhold, arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", sorted(_SIZES))
def test_models_have_as_many_parameters_as_their_makers_say(name: str) -> None:
    assert Transformer.load(name).parameters == pytest.approx(_SIZES[name], rel=0.005)


def test_every_model_that_ships_is_checked() -> None:
    assert names("models") == sorted(_SIZES)


def test_flops_are_those_of_the_formula_of_megatron() -> None:
    layers, hidden, vocab, seq = 48, 6144, 51200, 2048
    model = Transformer(layers=layers, hidden=hidden, heads=64, ffn=4 * hidden, vocab=vocab, seq=seq)
    formula = 72 * seq * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (12 * layers * hidden))
    assert model.flops == pytest.approx(formula, rel=1e-12)


def test_activations_are_those_of_the_formula_of_selective_recomputation() -> None:
    model = Transformer(layers=4, hidden=6144, heads=64, ffn=4 * 6144, vocab=51200, seq=2048, dropout=True)
    cluster = msgspec.structs.replace(Cluster.load("a100"), flash=False)
    sbh = model.seq * 4 * model.hidden
    stored = activations(Layers(model, Strategy(batch=4, tp=8, microbatch=4), cluster))
    # arXiv 2205.05198, equation 4, without the masks of the two dropouts behind the blocks (1 byte each there).
    assert stored == pytest.approx(sbh / 8 * (34 + 5 * model.heads * model.seq / model.hidden), rel=0.01)
    selective = activations(Layers(model, Strategy(batch=4, tp=8, microbatch=4, recompute="selective"), cluster))
    assert selective == pytest.approx(sbh * 34 / 8, rel=0.01)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_an_even_pipeline_takes_what_the_formula_says(stages: int, chunks: int) -> None:
    microbatches = 3 * stages
    forward = [[1.0 / chunks] * chunks] * stages
    backward = [[2.0 / chunks] * chunks] * stages
    # arXiv 2104.04473, section 2.2: the bubble is (p - 1) (f + b) / v.
    expected = 3.0 * (microbatches + (stages - 1) / chunks)
    assert makespan(forward, backward, microbatches) == pytest.approx(expected)


def test_a_long_pipeline_is_continued_from_its_rounds() -> None:
    forward, backward = [[1.0], [2.0], [1.5]], [[2.0], [4.0], [3.0]]
    short, long = (makespan(forward, backward, count) for count in (12, 500))
    assert long == pytest.approx(short + 488 * 6.0)


def test_layers_are_spread_and_the_ends_have_fewer() -> None:
    assert split_layers(126, 16) == [7, *[8] * 14, 7]
    assert split_layers(8, 4) == [2, 2, 2, 2]
    assert sum(split_layers(105, 35 * 2)) == 105


def test_products_slow_down_where_tiles_do_not_fill_the_device() -> None:
    kernels = Kernels(Cluster.load("h100"))

    def rate(m: int, n: int, k: int) -> float:
        return 2.0 * m * n * k / kernels.product(m, n, k)

    assert rate(8192, 8192, 8192) > 0.9 * kernels.cluster.matmul_efficiency * 989e12
    assert rate(128, 128, 8192) < 0.02 * 989e12
    assert rate(8192, 8192, 64) < 0.5 * rate(8192, 8192, 8192)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"recompute": "full"}, "products"),
        ({"sequence_parallel": False}, "elementwise"),
        ({"interleave": 1}, "bubble"),
        ({"attention": "unfused"}, "attention"),
        ({"zero": 0}, "optimizer"),
    ],
)
def test_each_effect_costs_where_it_belongs(change: dict[str, Any], cause: str) -> None:
    model, cluster = Transformer.load("llama3-70b"), Cluster.load("h100")
    base = Strategy(batch=128, dp=4, tp=4, pp=4, microbatch=1, interleave=4)
    before = predict(model, base, cluster)
    after = predict(model, msgspec.structs.replace(base, **change), cluster)
    assert after.seconds.by_cause()[cause] > 1.05 * before.seconds.by_cause()[cause]
    assert after.time > before.time
    assert sum(before.seconds.by_cause().values()) == pytest.approx(before.time)


def test_tensor_parallelism_across_nodes_costs_more() -> None:
    model, cluster = Transformer.load("llama3-8b"), Cluster.load("h100")
    inside = predict(model, Strategy(batch=16, tp=8), cluster)
    across = predict(model, Strategy(batch=16, tp=8), msgspec.structs.replace(cluster, node=4))
    assert across.seconds.tensor > 1.5 * inside.seconds.tensor


def test_experts_across_nodes_cost_more() -> None:
    model, cluster = Transformer.load("mixtral-8x22b"), Cluster.load("h100")
    strategy = Strategy(batch=16, dp=16, ep=8)
    inside = predict(model, strategy, cluster).seconds.expert
    across = predict(model, msgspec.structs.replace(strategy, tp=2, dp=8), msgspec.structs.replace(cluster, node=2))
    assert across.seconds.expert > 3 * inside
    # Each rank sends 7 of 8 parts of its tokens over its own card, whatever the others of its node do.
    group = cluster.group(8, 8)
    assert group.exchange(8e9) == pytest.approx(7e9 / cluster.network, rel=0.01)
    experts = Strategy(batch=16, dp=2, tp=2, cp=4, ep=2)
    far = msgspec.structs.replace(experts, expert_ranks="far")
    assert predict(model, far, cluster).seconds.expert > 1.5 * predict(model, experts, cluster).seconds.expert
    assert cluster.group(8, 4).exchange(8e9) == pytest.approx(6e9 / cluster.network, rel=0.01)


def test_attention_is_less_efficient_on_short_sequences() -> None:
    kernels = Kernels(Cluster.load("h100"))
    assert kernels.attention(1e12, 1024) > 1.3 * kernels.attention(1e12, 16384)


def test_sharding_more_needs_less_memory() -> None:
    model, cluster = Transformer.load("llama3-8b"), Cluster.load("h100")
    needed = [peak(Layers(model, Strategy(batch=64, dp=64, zero=zero), cluster)).total for zero in range(4)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > 1.5 * needed[1]
    gathered = [peak(Layers(model, Strategy(batch=64, dp=64, zero=3, tp=tp), cluster)).parameters for tp in (1, 4)]
    assert gathered[0] == pytest.approx(4 * gathered[1], rel=0.01)


def test_divisions_that_differ_in_nothing_that_matters_are_one() -> None:
    model, cluster = Transformer.load("llama3-70b"), Cluster.load("h100")
    best = search(model, cluster, 64, 128).best
    alike = [(kept, other) for kept in best for other in kept.alike]
    assert alike
    for kept, other in alike:
        mine, theirs = kept.strategy, other.strategy
        assert (mine.tp, mine.pp, mine.dp * mine.cp) == (theirs.tp, theirs.pp, theirs.dp * theirs.cp)
        assert mine.microbatch * theirs.cp == theirs.microbatch * mine.cp
        assert kept.prediction.time <= other.prediction.time <= 1.02 * kept.prediction.time
        assert kept.prediction.memory.total == pytest.approx(other.prediction.memory.total)
    listed = [str(c.strategy) for kept in best for c in (kept, *kept.alike)]
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("devices", [6, 12, 24])
def test_every_division_uses_all_devices(devices: int) -> None:
    model, cluster = Transformer.load("llama3-8b"), Cluster.load("h100")
    found = list(strategies(model, cluster, devices, 24, "bf16"))
    assert {strategy.devices for strategy in found} == {devices}


def test_what_a_stage_saves_is_taken_off_its_layers() -> None:
    model, cluster = Transformer.load("llama3-8b"), Cluster.load("h100")
    asked: list[Layers] = []

    def inside(layers: Layers) -> tuple[float, float]:
        asked.append(layers)
        return (1e-4, 2e-4) if layers.strategy.tp == 2 else (0.0, 0.0)

    as_formulas, planned = search(model, cluster, 16, 64, 3), search(model, cluster, 16, 64, 3, inside=inside)
    assert len(asked) == len(as_formulas.best)
    strategy = Strategy(batch=64, dp=8, tp=2)
    before, after = (predict(model, strategy, cluster, saved=saved) for saved in ((0.0, 0.0), (1e-4, 2e-4)))
    assert before.time - after.time == pytest.approx(8 * model.layers * 3e-4, rel=0.01)
    assert sum(after.seconds.by_cause().values()) == pytest.approx(after.time)
    assert [c.prediction.time for c in planned.best] == sorted(c.prediction.time for c in planned.best)


def test_the_search_finds_the_best_and_says_why_others_lose() -> None:
    model, cluster = Transformer.load("llama3-70b"), Cluster.load("h100")
    found = search(model, cluster, 64, 128)
    times = [candidate.prediction.time for candidate in found.best]
    assert len(times) == 10
    assert times == sorted(times)
    assert 0 < found.pruned < found.tried
    assert all(candidate.prediction.memory.total <= cluster.memory for candidate in found.best)
    assert all(worse.why(better) for better, worse in zip(found.best, found.best[1:], strict=False))
    with pytest.raises(DoesNotFit, match=r"none of .* fits"):
        search(model, cluster, 64, 128, memory=5e9)


def test_published_rows_are_predicted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prediction", "--json", "/dev/stdout"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    overall = json.loads(done.stdout[done.stdout.index("\n{") :])["scores"][0]
    assert overall["count"] >= 145
    assert overall["error"] < 0.09
    assert overall["rank"] > 0.96


def test_the_calibrated_numbers_are_those_in_the_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prediction", "--calibrate"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("efficiency") == 3


def test_predict_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "predict", "--config", "llama3-70b", "--tp", "8", "--pp", "8", "--dp", "16", "--batch", "1024", "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert report["devices"] == 1024
    assert 200 < report["model_tflops_per_device"] < 600
    assert report["memory"]["total"] == pytest.approx(sum(v for k, v in report["memory"].items() if k != "total"))


def test_predict_takes_a_model_by_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = "--layers 24 --hidden 2304 --heads 24 --vocab 51200 --seq 2048 --tied --dp 32 --batch 512 --microbatch 16"
    code, out, _ = run(capsys, "predict", *numbers.split(), "--hardware", "a100", "--recompute", "full")
    assert code == 0
    assert "TFLOP/s a device" in out
    assert "DOES NOT FIT" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict", "--config is needed"),
        ("predict --config nonesuch", "llama3-8b"),
        ("predict --config llama3-8b --hardware v100", "a100"),
        ("predict --config llama3-8b --tp 3", "does not divide"),
        ("predict --config llama3-8b --dp 3 --batch 4", "no multiple"),
        ("predict --config llama3-8b --interleave 2", "only one stage"),
        ("predict --config llama3-8b --ep 2", "experts"),
        ("predict --config /nowhere/model.json", "no file"),
        ("predict --config llama3-80b", "did you mean llama3-8b?"),
        ("predict --config llama3-8b --hardware h1000", "did you mean h100?"),
        ("predict --config llama3-8b --devices 10 --tp 4", "no multiple of tp 4"),
        ("predict --config llama3-8b --devices 16 --tp 4 --dp 2", "dp 4 would be"),
        ("predict --config llama3-8b --dp 3 --batch 4", "3 or 6 would be"),
        ("predict --config llama3-8b --pp 64", "do not fill"),
        ("plan --config llama3-8b", "--devices"),
        ("plan --example mlp --precision fp8", "--precision is for --config"),
        ("plan --config llama3-80b --devices 8", "did you mean llama3-8b?"),
        ("plan --config llama3-8b --layers 4 --devices 11 --batch 7", "nothing divides"),
    ],
)
def test_predict_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    "content", ["not json", "{}", '{"layers": -1}', '{"layers": 1, "strange": 2}', "[]", '{"layers": "many"}']
)
def test_a_file_that_is_no_model_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="does not describe"):
        Transformer.load(str(path))


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
_MIXTRAL = _LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
_GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


@pytest.mark.parametrize(
    ("config", "parameters", "gated", "tied"),
    [(_LLAMA, 8.03e9, True, False), (_MIXTRAL, 46.7e9, True, False), (_GPT2, 123.6e6, False, True)],
)
def test_a_config_of_hugging_face_is_read(
    config: dict[str, Any], parameters: float, gated: bool, tied: bool, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model = Transformer.load(str(path))
    assert model.parameters == pytest.approx(parameters, rel=0.005)
    assert (model.gated, model.tied) == (gated, tied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers or n_layer"),
        ({"kv_lora_rank": 512}, "compressed keys"),
        ({"n_shared_experts": 1}, "every token"),
        ({"num_attention_heads": 33}, "no multiple"),
    ],
)
def test_a_config_of_another_kind_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_LLAMA | change))
    with pytest.raises(UsageError, match=message):
        Transformer.load(str(path))


def test_what_cannot_fit_says_how_much_it_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "--config", "llama3-405b", "--devices", "16")
    assert (code, out) == (1, "")
    assert "the least is" in err
    code, out, _ = run(capsys, "predict", "--config", "llama3-405b", "--tp", "8", "--devices", "64", "--json")
    assert code == 0
    assert json.loads(out)["fits"] is False
    _, out, _ = run(capsys, "predict", "--config", "llama3-405b", "--tp", "8", "--devices", "64")
    assert "DOES NOT FIT in 80 GB; with --recompute full --zero 3 it needs" in out
