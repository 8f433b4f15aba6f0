"""How much of its work a training job does while a peer is lost every ten seconds: against the same job left alone.

    python -m benchmarks.goodput

Both runs are `ringhold train` with the same pace (a step takes at least so long, so that the processors are not the
limit); in one of them peers are killed, stopped and joined at random, a fault each `--every` seconds, and those that
are lost come back. Goodput is committed steps a second, from the first to the last, of the one run over the other.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.figures import table, write_json
from launch.record import read_log


def train(out: Path, peers: int, steps: int, pace: float, churn: list[str]) -> tuple[float, int, int]:
    """Run a job; committed steps a second, faults, and whether its proofs held."""
    words = ["--peers", str(peers), "--steps", str(steps), "--pace", str(pace), "--batch", str(2 * peers)]
    words += ["--microbatch", "2", "--out", str(out), "--json", "--quiet", *churn]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *words], capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"ringhold train {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    log = read_log(out / "run.jsonl")
    reached: dict[int, float] = {}
    for entry in log:
        if entry["type"] == "progress":
            reached.setdefault(entry["step"], entry["time"])
    first, last = min(reached), max(reached)
    speed = (last - first) / (reached[last] - reached[first])
    return speed, sum(entry["type"] == "fault" for entry in log), done.returncode


@click.command()
@click.option("--peers", default=8, show_default=True, help="At the start.")
@click.option("--steps", default=120, show_default=True, help="Of each run.")
@click.option("--pace", default=0.5, show_default=True, help="Seconds of a step, at least.")
@click.option("--every", default=10.0, show_default=True, help="Seconds between two faults, on average.")
@click.option("--seed", default=1, show_default=True, help="Of the faults.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(peers: int, steps: int, pace: float, every: float, seed: int, json_file: Path | None) -> int:
    """Compare a run under faults with one without."""
    rate = 100 * pace / every
    with tempfile.TemporaryDirectory(prefix="ringhold-goodput-") as folder:
        alone, _, _ = train(Path(folder) / "alone", peers, steps, pace, [])
        churn = ["--churn-rate", f"{rate:g}", "--restart", "--seed", str(seed)]
        struck, faults, code = train(Path(folder) / "struck", peers, steps, pace, churn)
    ratio = struck / alone
    print(
        table(
            ["steps/s", "alone", "under faults", "faults", "goodput"],
            [
                [f"{peers} peers", f"{alone:.2f}", f"{struck:.2f}", faults, f"{ratio:.3f}"],
            ],
        )
    )
    write_json(json_file, {"alone": alone, "struck": struck, "faults": faults, "goodput": ratio, "code": code})
    print(json.dumps({"proofs": "held" if code == 0 else "failed"}))
    return code


if __name__ == "__main__":
    sys.exit(main(standalone_mode=False))
