"""How long capturing and planning take, and how much memory: Llama-3 8B with 32 layers, and the same with 80, on 2x4.

python -m benchmarks.planning [--layers 32 80] [--mesh 2x4]
"""

import resource
import time
from pathlib import Path

import click

from benchmarks.figures import table, write_json
from launch.plan_request import mesh_of
from parallel.models.examples import example
from parallel.planner import plan


@click.command()
@click.option("--layers", "counts", type=click.IntRange(1), multiple=True, default=(32, 80), show_default=True)
@click.option("--mesh", default="2x4", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(counts: tuple[int, ...], mesh: str, json_file: Path | None) -> None:
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


if __name__ == "__main__":
    main()
