"""The kernel's own counters of real interfaces, in network namespaces, against the closed formulas."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from parallel.attention.formulas import rank_bytes
from parallel.attention.layout import Problem
from parallel.attention.shares import Balance

ROOT = Path(__file__).parents[3]
SCHEMES = ("token_ring", "ulysses")


def test_interfaces_count_what_the_formulas_say() -> None:
    """To a hundredth, for each rank and direction; by formulas that are evaluated here, not there."""
    command = [sys.executable, "-m", "benchmarks.attention", "counters", "--length", "1024", "--json", "--scheme"]
    done = subprocess.run([*command, *SCHEMES], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(SCHEMES) * 2 * 4
    shares = Balance().shares(1024, 4)
    for row in rows:
        problem = Problem(1, 8, 4, 64, torch.float32, shares, shares, False, 1.0, row["scheme"], 1, 2)
        due = rank_bytes(problem, row["rank"], row["pass"] == "backward")
        for way, formula in (("sent", due.sent), ("received", due.received)):
            assert formula > 2**20, "too little to be told from headers"
            assert formula <= row[way] <= 1.01 * formula, row
