"""`ringhold plan`: where every tensor of a training step should live, and what is sent because of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collectives.errors import UsageError
from launch import console
from launch.bench_request import parse_size
from launch.scale_options import model_options

if TYPE_CHECKING:
    from parallel.plans import Plan


@click.command("plan", context_settings={"max_content_width": 100})
@click.option("--example", metavar="NAME", help="A model that ships: mlp, gpt, llama, mixtral, vit, cnn...")
@click.option("--step", "step", metavar="FILE:FUNCTION", help="Your own step; see below.")
@model_options
@click.option("--batch", type=click.IntRange(1), help="Samples of a step.  [default: 8; of --config: 4 M tokens]")
@click.option("--mesh", help='Ranks: "4", "2x4" or "dp=2,tp=4".  [default: 4]')
@click.option("--memory", help="Bytes that a rank may hold, with K, M or G.")
@click.option("--pin", "pins", multiple=True, metavar="NAME=S(0),B", help="Where a tensor must live; may be repeated.")
@click.option("--redundancy", type=click.IntRange(0, 1), help="1 counts second copies of what one rank holds alone.")
@click.option("--devices", type=click.IntRange(1), help="Devices of the cluster, with --config.")
@click.option("--precision", type=click.Choice(["bf16", "fp8"]), help="Of products, with --config.  [default: bf16]")
@click.option(
    "--hardware",
    metavar="NAME|FILE",
    help="h100, a100, a file of a cluster, or that of --profile.  [default: CPU ranks]",
)
@click.option("--profile", type=click.Path(path_type=Path), help="What `ringhold bench --calibrate --json` saved.")
@click.option("--top", type=click.IntRange(1), help="Show so many of the best plans.")
@click.option("--explain", is_flag=True, help="Also compare with data and tensor parallelism alone.")
@click.option("--html", type=console.OutputFile(), help="Draw the sharded graph in a page of its own.")
@click.option("--untied", is_flag=True, help="Plan equal layers each by itself (slow).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(**given: Any) -> None:
    """Plan where every tensor of a training step lives on a mesh of ranks.

    Bytes are those that all ranks together send. FUNCTION of --step takes nothing and returns a captured step, or what
    `parallel.capture` takes, in this order: a loss function of model and batch, the model, its optimizer, and a batch.
    Build the model under torch.device("meta") and nothing is allocated. FILE is run as `python FILE` would run it. With
    --config and --devices it plans on paper for a cluster.

    \b
    ringhold plan --example mlp --batch 1024 --hidden 128 --mesh 4
    ringhold plan --step train.py:make_step --mesh dp=2,tp=4 --memory 2G --pin head.weight=B,S(0)
    ringhold plan --config llama3-70b --devices 1024 --hardware h100
    """
    chosen = [name for name in ("example", "step", "config") if given[name] is not None]
    if len(chosen) != 1:
        raise UsageError("say what to plan for: one of --example NAME, --step FILE:FUNCTION or --config NAME")
    memory = parse_size(given["memory"]) if given["memory"] else None
    if chosen == ["config"]:
        from launch import plan_scale

        for flag in ("mesh", "profile", "html", "redundancy", "pins", "explain", "untied"):
            if given[flag]:
                name = {"pins": "pin"}.get(flag, flag)
                raise UsageError(f"--{name} is for --example and --step; --config plans for --devices")
        plan_scale.run(given["config"], {**given, "memory": memory, "hardware": given["hardware"] or "h100"})
        return
    if given["devices"] is not None:
        raise UsageError("--devices is for --config; say the ranks of --example and --step by --mesh")
    if given["precision"] is not None:
        raise UsageError("--precision is for --config; the dtypes of --example and --step are those of their tensors")
    with console.told():
        _plan_step(given, memory)


def _plan_step(given: dict[str, Any], memory: int | None) -> None:
    from launch.plan_request import machine_of, mesh_of, pins_of, step_of
    from parallel.planner import plans

    mesh, machine, pins = (
        mesh_of(given["mesh"] or "4"),
        machine_of(given["hardware"], given["profile"]),
        pins_of(given["pins"]),
    )
    step = step_of(given)
    tied, redundancy = not given["untied"], given["redundancy"] or 0
    found = plans(step, mesh, given["top"] or 1, memory, pins, machine, tied, redundancy=redundancy)
    rivals: dict[str, Plan | None] = {}
    if given["explain"]:
        from launch.plan_rivals import compare

        rivals = compare(step, mesh, machine, tied, pins, memory, redundancy)
    if given["html"] is not None:
        from launch.plan_page import page

        try:
            given["html"].write_text(page(found[0]))
        except OSError as error:
            raise UsageError(f"--html {given['html']}: {error.strerror or error}") from None
    if given["as_json"]:
        print(json.dumps(_report(found, rivals)))
    else:
        _show(found, rivals)


def _report(found: Sequence["Plan"], rivals: dict[str, "Plan | None"]) -> dict[str, Any]:
    report = found[0].to_json()
    if len(found) > 1:
        report["runners_up"] = [plan.to_json() for plan in found[1:]]
    if rivals:
        report["compared"] = {name: plan.to_json() if plan else None for name, plan in rivals.items()}
    return report


def _show(found: Sequence["Plan"], rivals: dict[str, "Plan | None"]) -> None:
    from launch.plan_rivals import differences, summary

    print(found[0].explain())
    for number, plan in enumerate(found[1:], 2):
        print(f"number {number}: {summary(plan, found[0])}")
        for line in differences(plan, found[0]):
            print(f"    {line}")
    for name, rival in rivals.items():
        print(f"{name}: {summary(rival, found[0]) if rival else 'no such plan keeps within the memory and the pins'}")
