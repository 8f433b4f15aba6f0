"""What it costs to capture a training step: `python -m benchmarks.capture [NAME...]`.

Each model in a process of its own: seconds of the processor and of the clock for building it on the meta device and for
capturing its step with AdamW, nodes of the graph, and the most memory that the process had.
"""

import resource
import subprocess
import sys
import time

from launch.display import print_table

NAMES = ("gpt2", "llama3-8b", "llama3-70b", "mixtral-8x7b", "vit-b16")
BATCH = 8


def measure(name: str) -> None:
    """Print one row."""
    from parallel.models.examples import example

    example("mlp").capture()  # what torch loads when it traces for the first time
    busy, clock = time.process_time(), time.perf_counter()
    case = example(name, BATCH)
    built = time.process_time() - busy
    step = case.capture()
    spent, waited = time.process_time() - busy - built, time.perf_counter() - clock
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(parameter.numel() for parameter in case.model.parameters()) / 1e9
    seconds = [f"{value:.1f}" for value in (built, spent, waited)]
    cells = (f"{parameters:.2f} B", len(step.graph.nodes), *seconds, f"{memory:.2f}")
    print(name, *cells, sep="\t")


def main() -> None:
    """Measure each model in turn."""
    rows = []
    for name in sys.argv[1:] or NAMES:
        command = [sys.executable, "-c", f"from benchmarks.capture import measure; measure({name!r})"]
        rows.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\t"))
    headings = ("model", "parameters", "nodes", "build, CPU s", "capture, CPU s", "both, clock s", "memory, GiB")
    print_table(headings, rows)


if __name__ == "__main__":
    main()
