"""`ringhold demo`: a minute in which peers are killed, stopped and added, and the proof that nothing was lost."""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click

from launch import console, train

PEERS = 4
STEPS = 120
CHURN = "kill@14,stop@26,join@49,kill@62,coordinator@75,join@91"
"""Two SIGKILLs in the middle of an all-reduce, one SIGSTOP, two joins, one death of the coordinator."""
PACE = 0.33
"""A step takes at least so many seconds, so that what happens can be followed, and has time to happen."""


@click.command("demo")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Chooses victims and places; also data and weights."
)
@click.option("--dtype", default="fp32", show_default=True, help="fp32 or fp64.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep.  [default: a temporary one]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(seed: int, dtype: str, out: Path | None, as_json: bool, quiet: bool) -> int:
    """Train with 4 peers for a minute while faults strike, and prove that the result is right.

    Two peers are killed in the middle of an all-reduce, one is stopped for longer than the heartbeat timeout, two
    join, and the coordinator is killed and restarted. It succeeds only if all faults struck, every member that is left
    holds the same bits, each sample was used exactly once, and the losses are those of a run without faults; and if a
    deliberately wrong run is told apart from it.
    """
    folder = out or Path(tempfile.mkdtemp(prefix="ringhold-demo-")) / time.strftime("%Y%m%d-%H%M%S")
    if not quiet:
        print(f"results go to {folder}", file=sys.stderr, flush=True)
    chosen = ["--peers", str(PEERS), "--steps", str(STEPS), "--churn", CHURN, "--pace", str(PACE)]
    chosen += ["--seed", str(seed), "--dtype", dtype, "--out", str(folder), *(["--quiet"] if quiet else [])]
    request = train.make_request(None, **train.options(chosen))
    request = replace(request, command="demo", replay=f"ringhold demo --seed {seed} --dtype {dtype}")
    return train.conclude(request, None, as_json=as_json, reference=True, control=True)


if __name__ == "__main__":
    sys.exit(console.run(command))
