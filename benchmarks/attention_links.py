"""Every scheme of attention on an emulated mesh against the simulator: `python -m benchmarks.attention links`.

Computation is next to nothing, so that links alone count; they are slow, so that what processes cost beside, also on a
busy machine, is little against the transfers. Two schemes send so little that they are measured apart: ulysses on
slower links, and a tree, which sends (out, lse) of one query of each sequence, with many sequences.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.figures import table
from parallel.attention.layout import SCHEMES

APART = {"ulysses": ("--link", "128K"), "tree": ("--batch", "512")}
"""How these are measured. 512 sequences are 1 MiB a hop."""
WITHIN = 0.1


def links(given: argparse.Namespace) -> int:
    """Times by rank count and mask, beside the simulator's and the one-way ring's."""
    schemes = given.scheme or SCHEMES
    rows, met = [], []
    for ranks in given.ranks or (4, 8):
        for mask in ((), ("--causal",)):
            base = ("--ratio", "0.001", *mask)
            together = ",".join(name for name in schemes if name not in APART)
            found = modelled(given, together, ranks, given.length or 4096, *base) if together else []
            for name in (name for name in schemes if name in APART):
                length = 4 * ranks if name == "tree" else given.length or 4096
                found += modelled(given, name, ranks, length, *base, *APART[name])
            ring = next((row["time_s"] for row in found if row["scheme"] == "ring"), None)
            for row in found:
                ratio = row["time_s"] / row["predicted_s"]
                met.append(abs(ratio - 1) <= WITHIN)
                times = [f"{row[name] * 1e3:.0f}" for name in ("time_s", "predicted_s")]
                share = "" if ring is None or row["scheme"] in APART else f"{row['time_s'] / ring:.2f}"
                name = "causal, zigzag" if mask else "full"
                rows.append((ranks, name, row["scheme"], *times, f"{ratio:.2f}", share))
    print(table(("ranks", "mask", "scheme", "ms", "simulated", "ratio", "of the ring's"), rows))
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{sum(met)} of {len(met)} within {WITHIN:.0%} of the simulator; {load}")
    return 0


def modelled(given: argparse.Namespace, schemes: str, ranks: int, length: int, *more: str) -> list[dict[str, Any]]:
    """Run `ringhold attention` with computation modelled by sleeping; its rows."""
    asked = ["--scheme", schemes, "--ranks", str(ranks), "--seq", str(length), "--rounds", str(min(given.rounds, 2))]
    line = [sys.executable, "-m", "launch.attention", *asked, "--link", given.link or "1M", "--compute", "modelled"]
    done = subprocess.run(
        [*line, *more, "--check", str(min(length, 256)), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(row) for row in done.stdout.splitlines()]
