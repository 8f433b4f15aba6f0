"""Converting checkpoints: against DeepSpeed's ds_to_universal and torch's dcp_to_torch_save, in turns in one run.

    python -m benchmarks.conversion                      # about 500 MB of weights and moments, made here
    python -m benchmarks.conversion --rows dcp --sizes 0.5,2,4

Every turn is a new process on either side, the data the same, on the same disk, in the page cache. Time is until all
that was written is flushed; memory is the peak of all processes, without what children share with their parent. Ratios
above 1 are in favour of Ringhold; they are of medians.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.conversion_data import write_deepspeed
from benchmarks.figures import table
from checkpoint.convert import flush
from tests.harness.foreign import FOREIGN, RINGHOLD, environment

ROWS = ("zero1", "zero2", "zero3", "dcp")
_LOOK = 0.02
"""Seconds between two looks at the memory."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a conversion took: seconds until flushed, seconds of processor, bytes of memory at the peak."""

    wall: float
    cpu: float
    peak: int


def measure(command: list[str], output: Path) -> Cost:
    """Run a conversion and flush what it wrote. Raises `click.ClickException` if it fails."""
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while child.poll() is None:
            peak = max(peak, _memory(child.pid))
            time.sleep(_LOOK)
        if child.returncode:
            log.seek(0)
            raise click.ClickException(f"{' '.join(command)}: {log.read()[-2000:].decode(errors='replace')}")
    flush(output)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, peak)


def _memory(process: int, child: bool = False) -> int:
    """Resident bytes of a process and its children, of these without what they share."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
        own = (resident - shared if child else resident) * os.sysconf("SC_PAGE_SIZE")
        children = [int(word) for task in Path(f"/proc/{process}/task").iterdir() for word in _children(task)]
    except OSError:  # it ended while we looked
        return 0
    return own + sum(_memory(one, True) for one in children)


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


@dataclass(frozen=True, slots=True)
class Row:
    """Two commands that do the same: ours, the peer's; each writes to the path that it is given."""

    name: str
    peer: str
    ours: Callable[[Path], list[str]]
    theirs: Callable[[Path], list[str]]


def _zero(stage: int, data: Path) -> Row:
    source = data / f"zero{stage}"
    if not source.exists():
        print(f"training 42 million parameters under ZeRO-{stage}", file=sys.stderr)
        write_deepspeed(source, stage)
    (tag,) = (path.name for path in source.glob("global_step*"))
    tool = [str(FOREIGN), "-m", "deepspeed.checkpoint.ds_to_universal"]
    return Row(
        f"ZeRO-{stage}, 4 ranks, to universal",
        "ds_to_universal",
        lambda out: [*RINGHOLD, "ckpt", "convert", str(source), str(out), "--to", "deepspeed-universal"],
        lambda out: [*tool, "--input_folder", str(source / tag), "--output_folder", str(out)],
    )


def _dcp(size: float, data: Path) -> Row:
    source = data / f"dcp-{size:g}"
    if not source.exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.conversion_data", "dcp", source, str(size)],
            env=environment(),
            check=True,
        )
    tool = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    return Row(
        f"DCP of {size:g} GB, 4 ranks, to one file",
        "dcp_to_torch_save",
        lambda out: [*RINGHOLD, "ckpt", "convert", str(source), str(out), "--to", "plain"],
        lambda out: [*tool, str(source), str(out)],
    )


def compare(row: Row, turns: int, data: Path) -> dict[str, Any]:
    """Take turns and return the medians of both sides."""
    costs: dict[str, list[Cost]] = {"ours": [], "theirs": []}
    output = data / "output"
    for _ in range(turns):
        for side, command in (("ours", row.ours), ("theirs", row.theirs)):
            costs[side].append(measure(command(output), output))
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    found: dict[str, Any] = {"row": row.name, "peer": row.peer, "turns": turns}
    for side, taken in costs.items():
        for name in ("wall", "cpu", "peak"):
            found[f"{side}_{name}"] = statistics.median(getattr(one, name) for one in taken)
    return found


@click.command()
@click.option("--rows", default=",".join(ROWS), show_default=True, help="Which, with commas between.")
@click.option("--sizes", default="0.5", show_default=True, help="GB of the DCP folders, with commas between.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Keep the checkpoints here.  [default: a temporary folder]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(rows: str, sizes: str, turns: int, data: Path | None, as_json: bool) -> None:
    """Measure conversions."""
    place = Path(tempfile.mkdtemp(prefix="ringhold-conversion-")) if data is None else data
    place.mkdir(exist_ok=True)
    try:
        found = []
        for name in rows.split(","):
            made = (
                [_dcp(float(size), place) for size in sizes.split(",")]
                if name == "dcp"
                else [_zero(int(name[4:]), place)]
            )
            found += [compare(row, turns, place) for row in made]
    finally:
        if data is None:
            shutil.rmtree(place)
    if as_json:
        print(json.dumps(found))
        return
    print(
        table(
            ("", "seconds", "of", "times", "cpu", "of", "peak MiB", "of", "times less"), [_cells(row) for row in found]
        )
    )


def _cells(row: dict[str, Any]) -> list[str]:
    mine, peer = row["ours_peak"] / 2**20, row["theirs_peak"] / 2**20
    return [
        f"{row['row']} ({row['peer']})",
        f"{row['ours_wall']:.2f}",
        f"{row['theirs_wall']:.2f}",
        f"{row['theirs_wall'] / row['ours_wall']:.1f}",
        f"{row['ours_cpu']:.2f}",
        f"{row['theirs_cpu']:.2f}",
        f"{mine:.0f}",
        f"{peer:.0f}",
        f"{peer / mine:.1f}",
    ]


if __name__ == "__main__":
    command()
