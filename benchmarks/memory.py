"""How much memory an all-reduce takes beside the caller's tensor: its staging, at the peak.

    python -m benchmarks.memory [--mib 64] [--json FILE]

Each rank lets the kernel count its peak resident memory anew, reduces a few times, and reports by how much the peak
exceeds what it held before, less the result out of place. Half precision is staged in single: two tensors. Exits with 1
over twice the tensor and 16 MiB: segments being converted, and whatever else the process did meanwhile.
"""

import itertools
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.crew import Crew, Desk, usage
from benchmarks.figures import table, write_json

LIMIT = 2.0
MARGIN_MIB = 16
REPEATS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _peak() -> int:
    """Peak resident bytes since `_forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _measure(desk: Desk, mib: int, dtype: str, inplace: bool) -> None:
    """Body of a peer."""
    size = mib << 20
    with desk.join() as comm:
        comm.all_reduce(torch.ones(1 << 16))
        tensor = torch.ones(size // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])
        before = usage()["rss"]
        _forget_peak()
        for _ in range(REPEATS):
            comm.all_reduce(tensor, inplace=inplace)
        result = 0 if inplace or dtype == "fp32" else size  # in single precision the staging is the result
        desk.report("peak", ratio=(_peak() - before - result) / size)


def measure(world: int, mib: int, dtype: str, inplace: bool) -> dict[str, Any]:
    """Return the largest growth of any rank, in tensors. Fresh processes, whose pools are empty."""
    ratios: list[float] = []
    with Crew({"founders": world}) as crew:
        for _ in range(world):
            crew.start_peer(lambda desk: _measure(desk, mib, dtype, inplace))
        while len(ratios) < world:
            messages = crew.receive(120.0)
            if not messages:
                raise click.ClickException(f"no word from the peers for two minutes; {crew.status()}")
            for _, message in messages:
                if message["type"] == "failed":
                    raise click.ClickException(message["message"])
                if message["type"] == "peak":
                    ratios.append(message["ratio"])
    return {"ranks": world, "mib": mib, "dtype": dtype, "inplace": inplace, "tensors": round(max(ratios), 2)}


@click.command(help=__doc__)
@click.option("--mib", default=64, show_default=True, help="Size of the tensor.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows there.")
def main(mib: int, path: Path | None) -> None:
    """Print the table."""
    cases = itertools.product((2, 4), DTYPES, (True, False))
    rows = [measure(world, mib, dtype, inplace) for world, dtype, inplace in cases]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    write_json(path, {"limit": LIMIT, "rows": rows})
    if any(row["tensors"] > LIMIT + MARGIN_MIB / mib for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
