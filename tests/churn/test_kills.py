"""The short form of `benchmarks.kills`: members killed and stopped in the middle of all-reduces, every sum checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS, STOPS = 12, 1


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_no_sum_is_wrong_and_nobody_hangs_whoever_is_killed_or_stopped(tmp_path: Path, transport: str) -> None:
    figures = tmp_path / "kills.json"
    trials = ["--kills", str(KILLS), "--stops", str(STOPS), "--seed", "7", "--transport", transport]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", *trials, "--json", str(figures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert figures.exists(), run.stderr
    report = json.loads(figures.read_text())
    assert (report["wrong"], report["hangs"], report["leaks"]) == (0, 0, 0), run.stdout
    assert report["kills"] >= KILLS
    assert report["stops_returned"] == STOPS
    assert report["operations_checked"] > KILLS
    # Which of the two recoveries a kill leads to is left to chance here; the long form wants to see both.
    assert report["from_staging"] + report["run_again"] > 0
