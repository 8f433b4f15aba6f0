"""`ringhold predict`: what a training step of a transformer takes on a cluster, divided as the options say."""

import json
from typing import Any

import click
import msgspec

from collectives.errors import UsageError
from launch import units
from launch.display import print_table
from launch.scale_options import model_of, model_options
from parallel.scale.cluster import Cluster
from parallel.scale.layer import Layers
from parallel.scale.memory import peak
from parallel.scale.predict import Prediction, predict
from parallel.scale.strategy import Strategy
from parallel.scale.transformer import Transformer


@click.command("predict", context_settings={"max_content_width": 100})
@model_options
@click.option(
    "--hardware", default="h100", show_default=True, metavar="NAME|FILE", help="Cluster: h100, a100 or a file."
)
@click.option("--devices", type=click.IntRange(1), help="Devices in all; must be dp x tp x pp x cp, or gives dp.")
@click.option("--dp", type=click.IntRange(1), help="Data-parallel ranks.  [default: 1, or what --devices leaves]")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--pp", type=click.IntRange(1), default=1, show_default=True, help="Stages of the pipeline.")
@click.option("--cp", type=click.IntRange(1), default=1, show_default=True, help="Context-parallel ranks.")
@click.option("--ep", type=click.IntRange(1), default=1, show_default=True, help="Ranks that divide the experts.")
@click.option(
    "--expert-ranks",
    type=click.Choice(["near", "far"]),
    default="near",
    show_default=True,
    help="Ranks of an expert group: next to each other, or a context group apart.",
)
@click.option("--batch", type=click.IntRange(1), help="Sequences of a step, in all.  [default: as small as it may be]")
@click.option("--microbatch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--interleave", type=click.IntRange(1), default=1, show_default=True, help="Parts of a stage.")
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), default="none", show_default=True)
@click.option("--sequence-parallel/--no-sequence-parallel", default=True, show_default=True)
@click.option("--zero", type=click.IntRange(0, 3), default=1, show_default=True, help="What data parallelism shards.")
@click.option("--attention", type=click.Choice(["auto", "flash", "unfused"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True)
@click.option("--gradient-bytes", type=click.IntRange(0), default=0, help="Of a gradient.  [default: the cluster's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(config: str | None, hardware: str, as_json: bool, **given: Any) -> None:
    """Predict time, TFLOP/s and memory of a training step on a cluster that you do not have.

    Where the numbers of models and clusters come from, and how near published measurements the predictions are:
    docs/prediction.md. Options after --config change single numbers of the model.

    \b
    ringhold predict --config llama3-70b --tp 4 --pp 4 --dp 8 --batch 128 --interleave 5
    """
    model, cluster = model_of(config, given), Cluster.load(hardware)
    given["dp"] = _data_parallel(given)
    fields = {name: given[name] for name in Strategy.__struct_fields__ if given.get(name) is not None}
    fields.setdefault("batch", given["dp"] * given["microbatch"] * given["pp"])
    strategy = Strategy(**fields)
    prediction = predict(model, strategy, cluster)
    if as_json:
        about = {"devices": strategy.devices, "parameters": model.parameters, "batch": strategy.batch, "seq": model.seq}
        fits = {"fits": prediction.memory.total <= cluster.memory}
        print(json.dumps(about | prediction.to_json() | fits))
    else:
        show(model, strategy, cluster, prediction)


def _data_parallel(given: dict[str, Any]) -> int:
    """Data-parallel ranks: as said, or as many as there are devices for. UsageError: the two do not agree."""
    dp, devices, others = given["dp"], given["devices"], given["tp"] * given["pp"] * given["cp"]
    if devices is None:
        return dp or 1
    division = f"tp {given['tp']} x pp {given['pp']} x cp {given['cp']}"
    if devices % others:
        raise UsageError(f"{devices} devices are no multiple of {division} = {others}; take one less or more of these")
    if dp is not None and dp * others != devices:
        raise UsageError(
            f"dp {dp} x {division} = {dp * others}, not the {devices} of --devices; dp {devices // others} would be"
        )
    return int(devices // others)


def show(model: Transformer, strategy: Strategy, cluster: Cluster, prediction: Prediction) -> None:
    """Print a prediction for a person."""
    name = model.name or "the model"
    print(f"{name} ({model.parameters / 1e9:.4g} G parameters) on {strategy.devices} devices: {strategy}")
    print(f"batch {strategy.batch} of {model.seq} tokens")
    print(f"cluster: {cluster.name}")
    memory = prediction.memory
    fits = ""
    if memory.total > cluster.memory:
        fits = f"  DOES NOT FIT in {cluster.memory / 1e9:.4g} GB{_smaller(model, strategy, cluster)}"
    print(f"\nstep time         {units.duration(prediction.time)}  ({prediction.tokens:.0f} tokens/s a device)")
    print(
        f"TFLOP/s a device  {prediction.model_flops / 1e12:.0f} of the model, "
        f"{prediction.hardware_flops / 1e12:.0f} with what is computed again ({prediction.utilization:.1%} MFU)"
    )
    print(f"memory a device   {memory.total / 1e9:.1f} GB{fits}\n")
    causes = sorted(prediction.seconds.by_cause().items(), key=lambda item: -item[1])
    rows = [(cause, units.duration(took), f"{took / prediction.time:.1%}") for cause, took in causes if took > 0]
    print_table(("time goes to", "seconds", "share"), rows)
    parts = [(part, f"{getattr(memory, part) / 1e9:.1f} GB") for part in type(memory).__slots__]
    print_table(("memory goes to", "bytes"), parts)


def _smaller(model: Transformer, strategy: Strategy, cluster: Cluster) -> str:
    """What the same division needs if it recomputes and shards all that it can."""
    if strategy.recompute == "full" and strategy.zero == 3:
        return "; take more devices, or a smaller microbatch"
    least = msgspec.structs.replace(strategy, recompute="full", zero=3)
    needed = peak(Layers(model, least, cluster)).total
    return f"; with --recompute full --zero 3 it needs {needed / 1e9:.1f} GB"
