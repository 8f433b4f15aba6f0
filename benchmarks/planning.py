"""How long capturing and planning take, and how much memory: Llama-3 8B with 32 layers, and the same with 80, on 2x4.

python -m benchmarks.planning [--layers 32 --layers 80] [--mesh 2x4]
python -m benchmarks.planning --gaps      # a GPT of two layers on meshes and within memories: what is proven, how fast
"""

import resource
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import table, write_json
from launch.plan_request import mesh_of
from parallel.models.examples import example
from parallel.planner import NoPlan, plan
from parallel.solver import Unsolved

CASES: tuple[tuple[str, float | None], ...] = (
    ("4", None),
    ("4", 1e6),
    ("4", 8e5),
    ("2x4", None),
    ("2x4", 9e5),
    ("2x4", 7e5),
)
"""Meshes, and bytes that a rank may hold."""


@click.command()
@click.option("--layers", "counts", type=click.IntRange(1), multiple=True, default=(32, 80), show_default=True)
@click.option("--mesh", default="2x4", show_default=True)
@click.option("--gaps", is_flag=True, help="Plans of a small GPT within memory limits instead.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(counts: tuple[int, ...], mesh: str, gaps: bool, json_file: Path | None) -> None:
    if gaps:
        write_json(json_file, {"gaps": _gaps()})
        return
    rows = []
    for layers in counts:
        began, worked = time.perf_counter(), time.process_time()
        step = example("llama3-8b", 8, layers=layers, length=2048).capture()
        captured = time.perf_counter()
        found = plan(step, mesh_of(mesh))
        done = time.perf_counter()
        assert found.figures is not None
        rows.append(
            {
                "layers": layers,
                "nodes": len(step.graph.nodes),
                "capture_s": captured - began,
                "plan_s": done - captured,
                "processor_s": time.process_time() - worked,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "gap": found.figures.gap,
            }
        )
    heads = ["layers", "nodes", "capture", "plan", "processor", "memory so far", "gap"]
    lines = [
        [
            row["layers"],
            row["nodes"],
            f"{row['capture_s']:.1f} s",
            f"{row['plan_s']:.1f} s",
            f"{row['processor_s']:.1f} s",
            f"{row['peak_gib']:.2f} GiB",
            f"{row['gap']:.2%}",
        ]
        for row in rows
    ]
    print(table(heads, lines))
    write_json(json_file, {"mesh": mesh, "rows": rows})


def _gaps() -> list[dict[str, Any]]:
    """Plan for each case; print and return what is proven."""
    step, rows = example("gpt", 8).capture(), list[dict[str, Any]]()
    for mesh, memory in CASES:
        began = time.process_time()
        try:
            figures = plan(step, mesh_of(mesh), memory).figures
        except (NoPlan, Unsolved):
            figures = None
        rows.append(
            {
                "mesh": mesh,
                "memory": memory,
                "time": figures.time if figures else None,
                "gap": figures.gap if figures else None,
                "processor_s": time.process_time() - began,
            }
        )
    lines = [
        [
            row["mesh"],
            f"{row['memory'] / 1e3:.0f} kB" if row["memory"] else "-",
            f"{1e3 * row['time']:.3f} ms" if row["time"] else "none found",
            f"{row['gap']:.2%}" if row["time"] else "",
            f"{row['processor_s']:.1f} s",
        ]
        for row in rows
    ]
    print(table(["mesh", "memory", "plan", "gap", "processor"], lines))
    return rows


if __name__ == "__main__":
    main()
