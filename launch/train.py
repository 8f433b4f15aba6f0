"""`ringhold train`, also `python -m launch.train` under torchrun or MPI launchers: train with churn, prove the result.

What a launcher starts here is a supervisor with one peer as its child, so that a peer's death is no affair of the
launcher; started by hand it supervises all peers. `launch.demo` uses the same conclusion.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from collectives import faults as points
from collectives.errors import UsageError
from launch import console, faults, session, summary
from launch.config import JobConfig
from launch.environment import Launcher, detect

KILL_POINTS = tuple(point for point in points.POINTS if point not in {"enter", "copied"})
"""Where a planned kill may land: in the middle of an all-reduce, not before its first byte or after its last."""


@click.command("train", context_settings={"max_content_width": 100})
@click.option("--peers", type=click.IntRange(1), help="Peers to start.  [default: 4; under a launcher its processes]")
@click.option("--preset", default="1m", show_default=True, help="Model size: 1m, 10m or 100m parameters.")
@click.option("--steps", type=int, default=120, show_default=True, help="Steps of the whole run.")
@click.option("--batch", type=int, default=16, show_default=True, help="Samples a step, over all peers.")
@click.option("--microbatch", type=int, help="Samples a pass.  [default: 16; --reproducible: an eighth of the batch]")
@click.option("--reproducible", is_flag=True, help="Same bits as one process: microbatches summed exactly.")
@click.option("--context", type=int, default=64, show_default=True, help="Tokens (bytes of text) a sample.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Highest learning rate.")
@click.option("--dtype", default="fp32", show_default=True, help="fp32 or fp64.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data order, the weights and the churn.")
@click.option(
    "--data", multiple=True, metavar="FILE", help="Text to train on; repeatable.  [default: Python's own text]"
)
@click.option("--resume", metavar="PATH", help="Start from a final.safetensors, or from a STORE[@STEP] of checkpoints.")
@click.option("--checkpoint", default="", metavar="STORE", help="Save checkpoints to this folder or URL.")
@click.option("--checkpoint-every", type=int, default=20, show_default=True, help="Steps between two of them.")
@click.option("--shard-optimizer", is_flag=True, help="Each peer writes a flat part of the optimizer's state.")
@click.option("--churn", default="", metavar="LIST", help='Faults, as in "kill@12,stop@20:1,join@25,coordinator@30".')
@click.option("--churn-rate", type=float, default=0.0, help="Random faults instead, so many per 100 steps.")
@click.option("--restart", is_flag=True, help="Replace peers that are lost.")
@click.option("--pace", type=console.Finite(0), default=0.0, help="A step takes at least so many seconds.")
@click.option(
    "--coordinator", metavar="HOST:PORT", help="Join this coordinator.  [default: RINGHOLD_COORDINATOR, else our own]"
)
@click.option("--plan", default="", metavar="auto|AxB", help="Shard the step over a mesh of the peers by a plan.")
@click.option(
    "--pin", multiple=True, metavar="NAME=S(0)", help="With --plan: how a tensor must be placed, as batch.0=S(0)."
)
@click.option("--redundancy", type=int, default=0, help="With --plan: 1 keeps second copies of sharded state.")
@click.option("--run", "run_name", default="default", show_default=True, help="Name of the run.")
@click.option("--transport", default="gloo", show_default=True, help="What carries the tensors.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of results.  [default: runs/TIME]"
)
@click.option("--reference", is_flag=True, help="Compare with a run of one process without faults.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option(
    "--timeout", type=console.Finite(0, min_open=True), default=3600.0, show_default=True, help="Seconds for it all."
)
@click.option(
    "--stall-timeout",
    type=console.Finite(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds without a step.",
)
def command(**given: Any) -> int:
    """Train a small language model over peers that come and go, and judge the result.

    This process starts a coordinator and the peers, follows them, injects the faults of --churn at their steps, and at
    the end checks that every fault struck, every peer ended as planned, all hold the same bits, and each sample was
    used exactly once. A fault is KIND@STEP[:PEER] with KIND kill (SIGKILL in the middle of an all-reduce), stop
    (SIGSTOP until evicted), join, leave or coordinator (SIGKILL, then restarted). The seed chooses what is left open.

    \b
    torchrun --nproc-per-node 4 -m launch.train [OPTIONS]
    mpirun -n 4 python -m launch.train [OPTIONS]

    start one supervisor and one peer each; there a join brings a killed peer back. The membership's own options are
    environment variables: RINGHOLD_HEARTBEAT_TIMEOUT=2 and so on.
    """
    launcher = detect(os.environ)
    request = make_request(launcher, **given)
    return conclude(request, launcher, as_json=given["as_json"], reference=given["reference"])


def options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of `command` as a command line with these arguments would give them."""
    return command.make_context("train", list(arguments)).params


def make_request(launcher: Launcher | None, **given: Any) -> session.Request:
    """Check the options (those of `command`) and plan the churn.

    Raises:
        UsageError: options that contradict each other, or that the job or the schedule refuses.

    """
    if launcher is not None and given["peers"] not in (None, launcher.size):
        raise UsageError(
            f"under {launcher.title} there is a peer for each of its {launcher.size} processes; drop --peers"
        )
    peers = launcher.size if launcher is not None else given["peers"] or 4
    if given["churn"] and given["churn_rate"]:
        raise UsageError("--churn names the faults and --churn-rate draws them; give one of the two")
    coordinator = given["coordinator"] or os.environ.get("RINGHOLD_COORDINATOR", "")
    if coordinator:
        console.split_address(coordinator, "--coordinator")
    _check_transport(given["transport"])
    if given["transport"] == "mpi":
        _check_mpi(launcher, given)
    out = given["out"] or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    names = (
        "preset",
        "steps",
        "batch",
        "context",
        "lr",
        "dtype",
        "seed",
        "data",
        "resume",
        "checkpoint",
        "checkpoint_every",
        "shard_optimizer",
        "reproducible",
        "plan",
        "redundancy",
    )
    settings = {name: given[name] for name in names}
    settings["pins"] = _pins(given["pin"])
    if given["microbatch"] is not None:
        settings["microbatch"] = given["microbatch"]
    elif given["reproducible"]:
        settings["microbatch"] = max(1, given["batch"] // 8)
    config = JobConfig(out=str(out), **settings)
    return session.Request(
        peers=peers,
        config=config,
        faults=_plan(given, peers, config, revive=launcher is not None, ours=not coordinator),
        coordinator=coordinator,
        run=given["run_name"],
        transport=given["transport"],
        restart=given["restart"],
        pace=given["pace"],
        timeout=given["timeout"],
        stall=given["stall_timeout"],
        quiet=given["quiet"],
        replay=console.replay("train"),
    )


def conclude(
    request: session.Request, launcher: Launcher | None, *, as_json: bool, reference: bool, control: bool = False
) -> int:
    """Run it, prove it, print the summary (rank 0 alone), and return the exit code."""
    outcome = session.perform(request, launcher)
    verdict = session.await_verdict(outcome, request.timeout)
    if verdict is not None:
        return verdict
    code = summary.conclude(outcome, request, as_json=as_json, reference=reference, control=control)
    return outcome.conclude(code)


def _pins(given: Sequence[str]) -> dict[str, str]:
    """`NAME=PLACEMENTS` by name. Raises `UsageError` for anything else."""
    pins = {}
    for text in given:
        name, equals, placed = text.partition("=")
        if not (name and equals and placed):
            raise UsageError(f"--pin {text}: write NAME=PLACEMENTS, as in batch.0=S(0)")
        pins[name] = placed
    return pins


def _check_transport(name: str) -> None:
    if name == "gloo":
        return  # always there; the others are only known to a module that imports torch
    from collectives.epochs import parse_transport

    parse_transport(name)


def _check_mpi(launcher: Launcher | None, given: dict[str, Any]) -> None:
    """MPI takes nobody in after its job was started: all peers are its ranks, and none comes back."""
    if launcher is None or launcher.kind == "torchrun":
        raise UsageError(
            "--transport mpi needs an MPI launcher: mpirun --with-ft ulfm -n 4 python -m launch.train --transport mpi"
        )
    if given["restart"] or given["churn_rate"] or any(f.kind == "join" for f in faults.parse(given["churn"])):
        raise UsageError(
            "over MPI no peer can join after the start; drop --restart, --churn-rate and joins, or use --transport "
            "gloo, shm or sockets"
        )


def _plan(
    given: dict[str, Any], peers: int, config: JobConfig, *, revive: bool, ours: bool
) -> tuple[faults.Planned, ...]:
    asked = faults.parse(given["churn"])
    if config.plan and (given["churn_rate"] or given["restart"] or any(f.kind != "kill" for f in asked)):
        raise UsageError("members of a planned run may be killed, but none joins or comes back; use --churn kill@STEP")
    if given["churn_rate"]:
        asked = faults.draw(given["churn_rate"], peers, config.steps, config.seed, revive, coordinator=ours)
    if not ours and any(fault.kind == "coordinator" for fault in asked):
        raise UsageError(
            "coordinator faults need a coordinator of our own; drop --coordinator and RINGHOLD_COORDINATOR"
        )
    return faults.plan(asked, peers, config.steps, config.seed, points=KILL_POINTS, revive=revive)


if __name__ == "__main__":
    sys.exit(console.run(command))
