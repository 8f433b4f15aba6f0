"""The short form of `ringhold churn`: every fault that can be had here, every operation, every value checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.record import read_log

ROOT = Path(__file__).parents[2]
SECONDS = 8
FAULTS = {
    "gloo": "kill,stop,leave,join,coordinator,slow",
    "checked:sockets": "all",
    "shm": "kill,stop,leave,join,coordinator,slow,corrupt",
    "mpi": "kill,stop,leave,join,coordinator,slow,corrupt",
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("transport", list(FAULTS))
def test_no_value_is_wrong_and_nobody_hangs_whatever_strikes(tmp_path: Path, transport: str) -> None:
    figures, out = tmp_path / "churn.json", tmp_path / "run"
    settings = ["--peers", "2..5", "--seconds", str(SECONDS), "--seed", "5", "--every", "0.2..1", "--largest", "1M"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "launch.churn", *settings, "--transport", transport),
            *("--faults", FAULTS[transport], "--json", str(figures), "--out", str(out)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(figures.read_text())
    assert (report["wrong"], report["hangs"], report["leaks"], report["complaints"]) == (0, 0, 0, [])
    assert report["operations"] > 20
    assert report["syncs"] > 2
    assert sum(fault["fired"] for fault in report["faults"].values()) >= 4
    assert report["recoveries"]["all"]["first good operation"]["count"] > 0
    assert f"--seed 5 --faults {','.join(report['faults'])} --ops all --transport {transport}" in report["replay"]
    log = read_log(out / "run.jsonl")
    assert (log[0]["type"], log[0]["seed"]) == ("run", 5)
    assert (log[-1]["type"], log[-1]["passed"]) == ("verdict", True)
    assert {"started", "fault", "joined", "event", "rate"} <= {entry["type"] for entry in log}
