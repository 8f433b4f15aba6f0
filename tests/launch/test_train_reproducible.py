"""Reproducible training with real peers that are killed, join and leave: the very bits of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import reference, train

JOB = ("--preset", "tiny", "--batch", "9", "--context", "16", "--microbatch", "2", "--steps", "14", "--reproducible")


def run(out: Path, *arguments: str) -> dict[str, Any]:
    """Run the command to its end; its summary."""
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(out.parent)}
    command = [sys.executable, "-m", "launch.train", "--out", str(out), "--quiet", "--json", *JOB, *arguments]
    done = subprocess.run(command, check=False, env=environ, text=True, capture_output=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_kills_joins_and_leaves_do_not_show_in_the_bits(tmp_path: Path) -> None:
    churn = "kill@3,join@6,leave@9"
    summary = run(tmp_path / "run", "--peers", "3", "--pace", "0.1", "--churn", churn, "--reference")
    checks = {check["name"]: check["ok"] for check in summary["checks"]}
    assert checks["bits"]
    config = train.make_request(None, **train.options([*JOB, "--out", str(tmp_path / "none")])).config
    alone = reference.run(config)
    assert set(summary["hashes"].values()) == {alone.hash}
    # The claim is worth something: summed as they come, the same samples give other bits.
    assert reference.run(config.replace(reproducible=False)).hash != alone.hash


def test_the_microbatch_follows_from_the_job_alone() -> None:
    for peers in ("2", "5"):
        request = train.make_request(None, **train.options(["--reproducible", "--batch", "32", "--peers", peers]))
        assert request.config.microbatch == 4
    assert train.make_request(None, **train.options(["--batch", "32"])).config.microbatch == 16
