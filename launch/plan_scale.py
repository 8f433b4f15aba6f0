"""`ringhold plan --config`: the best ways to divide a training step among the devices of a cluster, on paper."""

import json
from typing import Any

from collectives.errors import UsageError
from launch import units
from launch.display import print_table
from launch.scale_options import model_of
from parallel.scale.cluster import Cluster
from parallel.scale.layer import Layers
from parallel.scale.predict import predict
from parallel.scale.search import Candidate, Found, search
from parallel.scale.strategy import Precision
from parallel.scale.transformer import Transformer
from parallel.stages import Stage, Stages

_TOKENS = 4_000_000
"""Of a step, about, if no batch is given."""
_SAME = 5e-4
"""Share of a layer's time below which a difference is none."""


def run(config: str, given: dict[str, Any]) -> None:
    """Search and print.

    Raises:
        UsageError: there is no such model or cluster, or nothing divides it among so many devices.
        DoesNotFit: no division keeps within the memory.

    """
    if given["devices"] is None:
        raise UsageError("--config plans for a cluster: say how many --devices it has")
    model, cluster = model_of(config, given), Cluster.load(given["hardware"])
    devices = given["devices"]
    batch = given["batch"] or max(1, _TOKENS // model.seq // devices) * devices
    memory = given["memory"]
    stages = Stages()
    precision: Precision = given["precision"] or "bf16"
    found = search(model, cluster, devices, batch, given["top"] or 10, precision, memory, stages.saved)
    inside = [stages.of(Layers(model, candidate.strategy, cluster)) for candidate in found.best]
    if given["as_json"]:
        print(json.dumps({"devices": devices, "batch": batch} | _report(model, cluster, found, inside)))
        return
    print(f"{model.name or config}, batch {batch} of {model.seq} tokens, on {devices} devices: {cluster.name}")
    print(f"{found.tried} strategies, {found.pruned} of them too large for {(memory or cluster.memory) / 1e9:.4g} GB\n")
    _show(found)
    _show_inside(model, inside)


def _show(found: Found) -> None:
    rows = []
    for number, candidate in enumerate(found.best):
        prediction = candidate.prediction
        rows.append(
            (
                str(candidate.strategy),
                units.duration(prediction.time),
                f"{prediction.model_flops / 1e12:.0f}",
                f"{prediction.memory.total / 1e9:.0f} GB",
                f"+{len(candidate.alike)}" if candidate.alike else "",
                candidate.why(found.best[number - 1]) if number else "the best",
            )
        )
    print_table(("division", "step", "TFLOP/s", "memory", "alike", "slower than the one above by"), rows)
    if any(candidate.alike for candidate in found.best):
        print(
            "alike: divisions that cut the same tokens into parts of sequences instead of samples, within 2%, such as"
        )
        first = next(candidate for candidate in found.best if candidate.alike)
        print(f"{_trade(first)}; --json lists them\n")


def _trade(candidate: Candidate) -> str:
    other = candidate.alike[0]
    slower = other.prediction.time / candidate.prediction.time - 1.0
    return f"{other.strategy} for {candidate.strategy} ({slower:+.1%})"


def _show_inside(model: Transformer, inside: list[Stage | None]) -> None:
    """The integer programs of the stages: one row for each kind of stage, in the order of the divisions."""
    kinds = {id(stage): stage for stage in inside if stage is not None}
    if not kinds:
        return
    part = "the attention of one layer" if model.experts > 1 else "one layer"
    print(f"inside a stage, by integer program: {part} of a microbatch, forward and backward")
    rows = []
    for stage in kinds.values():
        figures = stage.plan.figures
        assert figures is not None
        microbatch, tokens, _ = stage.plan.graph.named["x"].value.shape
        change = stage.time / stage.formula_time - 1.0
        rows.append(
            (
                f"tp={stage.plan.mesh.size}, {microbatch} x {tokens} tokens",
                units.duration(stage.formula_time),
                f"{units.duration(stage.time)} ({change:+.1%})",
                "optimal" if figures.gap < _SAME else f"within {figures.gap:.1%}",
                _otherwise(stage),
            )
        )
    print_table(("stage", "columns and rows", "the program", "proven", "what the program does otherwise"), rows)


def _otherwise(stage: Stage) -> str:
    """What the program's plan does that the formula's division does not, if it gains anything by it."""
    if stage.time > stage.formula_time * (1.0 - _SAME):
        return "nothing: it is Megatron's division"
    parts = []
    if stage.gathered:
        parts.append(f"gathers {', '.join(name.removesuffix('.weight') for name in stage.gathered)}")
    axis = {"S(0)": "samples", "S(1)": "tokens", "S(2)": "features", "B": "nothing"}
    if "x" in stage.moved:
        ours, theirs = stage.moved["x"]
        parts.append(f"splits activations along {axis[ours]}, not {axis[theirs]}")
    return "; ".join(parts) or "other collectives; see --json"


def _report(model: Transformer, cluster: Cluster, found: Found, inside: list[Stage | None]) -> dict[str, Any]:
    plans = []
    for number, (candidate, stage) in enumerate(zip(found.best, inside, strict=True)):
        plans.append(
            _division(candidate)
            | candidate.prediction.to_json()
            | {
                "time_as_formulas_divide_stages": predict(model, candidate.strategy, cluster).time,
                "loses_to_the_one_before_by": candidate.why(found.best[number - 1]) if number else "",
                "alike": [_division(other) | {"time": other.prediction.time} for other in candidate.alike],
                "stage": stage.to_json() if stage else None,
            }
        )
    return {"tried": found.tried, "pruned": found.pruned, "plans": plans}


def _division(candidate: Candidate) -> dict[str, Any]:
    names = ("dp", "tp", "pp", "cp", "ep", "microbatch", "interleave", "recompute", "zero", "precision")
    return {name: getattr(candidate.strategy, name) for name in names}
