"""The table of speed claims: our transports against torch's gloo and the MPI library, all taking turns.

    python -m benchmarks.collectives            # 2 and 4 ranks, 64K to 64M: some ten minutes
    python -m benchmarks.collectives --short    # about a minute

Runs `ringhold bench`, in which all competitors are in the same processes and take turns, so that whatever else the
machine does meets all alike; times are medians of the slowest rank. A cell is the time of ours, then how many times as
long gloo and MPI take: above 1 ours is faster. Then what fault tolerance costs (`benchmarks.overhead`).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import overhead
from benchmarks.figures import table, write_json
from collectives.errors import RingholdError

TRANSPORTS = ("shm", "gloo", "sockets", "mpi")
FOREIGN = ("gloo", "mpi")
KINDS = ("all_gather", "reduce_scatter", "all_to_all")
_PATIENCE = 1800.0

Row = dict[str, Any]


class Plan(NamedTuple):
    """What to measure: sizes of all_reduce, of the other kinds, and how often."""

    sizes: tuple[str, ...]
    others: tuple[str, ...]
    rounds: int
    overhead_turns: int


FULL = Plan(("64K", "1M", "16M", "64M"), ("16M",), 15, 20)
SHORT = Plan(("64K", "1M", "16M"), ("16M",), 4, 5)


def bench(
    kind: str, ranks: int, sizes: Sequence[str], rounds: int, transports: Sequence[str], foreign: Sequence[str]
) -> list[Row]:
    """Let all competitors take turns at each size; returns the rows of `ringhold bench`.

    Raises:
        RingholdError: it failed, or a value was wrong.

    """
    first, *others = transports
    rivals = [f"ours:{name}" for name in others] + list(foreign)
    command = [sys.executable, "-m", "launch.bench", kind, "--peers", str(ranks), "--transport", first]
    command += ["--sizes", ",".join(sizes), "-n", str(rounds), "-w", "2", "-c", "1", "--json", "-"]
    command += ["--vs", ",".join(rivals)] if rivals else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        raise RingholdError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def cells(row: Row, transports: Sequence[str], foreign: Sequence[str]) -> list[str]:
    """Return a cell for each of our transports."""
    first, *others = transports
    times = {first: row["time_us"], **{name: row["vs"][f"ours:{name}"]["time_us"] for name in others}}
    words = []
    for name in transports:
        ratios = " ".join(f"{row['vs'][rival]['time_us'] / times[name]:.2f}x" for rival in foreign)
        words.append(f"{times[name] / 1e3:.3f} {ratios}".strip())
    return words


def compare(plan: Plan, worlds: Sequence[int], transports: Sequence[str], foreign: Sequence[str]) -> list[Row]:
    """Measure and print everything; returns the rows."""
    rows: list[Row] = []
    for ranks in worlds:
        measured = {"all_reduce": plan.sizes, **dict.fromkeys(KINDS, plan.others)}
        lines = []
        for kind, sizes in measured.items():
            if sys.stderr.isatty():
                print(f"\r\033[K{ranks} ranks: {kind}", end="", file=sys.stderr)
            found = bench(kind, ranks, sizes, plan.rounds, transports, foreign)
            rows += found
            for row in found:
                form = "in place" if row["inplace"] else "out of place"
                lines.append([kind, f"{row['size'] // 1024} KiB", form, *cells(row, transports, foreign)])
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(f"{ranks} ranks: ms of ours, then the time of {' and '.join(foreign)} over it")
        print(table(["collective", "size", "form", *transports], lines), flush=True)
        print()
    return rows


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds, no 64M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--transport", nargs="+", default=list(TRANSPORTS))
    parser.add_argument("--vs", nargs="+", choices=FOREIGN, default=list(FOREIGN))
    parser.add_argument("--json", type=Path, help="file for all rows")
    options = parser.parse_args()
    plan = SHORT if options.short else FULL
    rows = compare(plan, options.ranks, options.transport, options.vs)
    write_json(options.json, {"rows": rows})
    # Without mpirun there is no MPI transport.
    alone = [name for name in options.transport if name != "mpi"]
    return 1 if overhead.report(options.ranks, alone, [1 << 16, 1 << 24], plan.overhead_turns) else 0


if __name__ == "__main__":
    raise SystemExit(main())
