"""Attention with real computation over shared memory against one process: `python -m benchmarks.attention real`.

Each round starts new processes: one that calls torch's attention on the whole, then the ranks. What counts of memory is
the most that a process had resident, shared memory that it has mapped and read among it, less what it had before the
tensors were made and behind a small pass, which loads libraries. The one process is the plain function, no schedule.
"""

import argparse
import os
import statistics
from typing import Any

from benchmarks.company import together
from benchmarks.figures import table


def real(given: argparse.Namespace) -> int:
    """Time, processor time and memory of the ranks, and of one process in turns with them."""
    settings = {"length": given.length or 16384, "heads": 8, "scheme": (given.scheme or ["ring"])[0]}
    rows = []
    for ranks in given.ranks or (2, 4):
        alone: list[dict[str, Any]] = []
        spread: list[dict[str, Any]] = []
        for _ in range(min(given.rounds, 3)):
            alone += together("attention", 1, "shm", "", settings)
            spread.append(_worst(together("attention", ranks, "shm", "", settings)))
        row: list[object] = [ranks]
        for name, unit, digits in (("seconds", 1, 2), ("processor", 1, 2), ("used", 2**20, 0)):
            ours, one = (statistics.median(taken[name] for taken in side) / unit for side in (spread, alone))
            row += [f"{ours:.{digits}f}", f"{one:.{digits}f}", f"{ours / one:.2f}"]
        rows.append(tuple(row))
    titles = [f"{name}{what}" for name in ("s", "processor s", "MiB") for what in ("", ", one process", ": ratio")]
    print(table(("ranks", *titles), rows))
    print(f"of the rank with most; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0


def _worst(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: max(one[name] for one in found) for name in ("seconds", "processor", "used")}
