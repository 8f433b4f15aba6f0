"""What checksums of tensor data cost: all-reduces over checked and unchecked transports, by turns in one process each.

python -m benchmarks.checksums
"""

import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.figures import table, write_json
from collectives.communicator import Communicator
from launch.crew import Crew, Desk

SIZES = (65536, 1 << 20, 16 << 20)
PAIRS = ("sockets", "gloo")
IN_A_ROW = 4


def take_turns(desk: Desk, places: dict[str, tuple[str, str, str]], turns: int) -> None:
    """Reduce over each transport in turn and report the fastest of each few."""
    comms = {
        name: Communicator.join(*place, transport=name, options={"founders": desk.options.founders})
        for name, place in places.items()
    }
    for size in SIZES:
        tensor = torch.ones(size // 4)
        for _ in range(turns):
            for name, comm in comms.items():
                comm.barrier()
                times = []
                for _ in range(IN_A_ROW):
                    begun = time.perf_counter()
                    comm.all_reduce(tensor, "max")
                    times.append(time.perf_counter() - begun)
                desk.report("turn", size=size, transport=name, seconds=min(times))
    for comm in comms.values():
        comm.leave()


@click.command()
@click.option("--peers", default=2, show_default=True, help="Members.")
@click.option("--turns", default=12, show_default=True, help="Of each transport and size.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(peers: int, turns: int, json_file: Path | None) -> None:
    """Compare the transports."""
    names = [f"{prefix}{pair}" for pair in PAIRS for prefix in ("", "checked:")]
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        crews = {name: stack.enter_context(Crew({"founders": peers})) for name in names}
        first = crews[names[0]]
        places = {name: crew.place for name, crew in crews.items()}
        for _ in range(peers):
            first.start_peer(partial(take_turns, places=places, turns=turns))
        while first.living:
            for _, message in first.receive(0.1):
                assert message["type"] != "failed", message
                if message["type"] == "turn":
                    times[message["size"], message["transport"]].append(message["seconds"])
    rows, report = [], {}
    for size in SIZES:
        medians = {name: statistics.median(times[size, name]) for name in names}
        ratios = {pair: round(medians[f"checked:{pair}"] / medians[pair], 3) for pair in PAIRS}
        report[str(size)] = {"seconds": medians, "ratio": ratios}
        rows.append([size, *(f"{1000 * medians[name]:.2f}" for name in names), *ratios.values()])
    print(f"all_reduce, {peers} members, ms; ratios: with checksums over without")
    print(table(["bytes", *names, *(f"{pair} ratio" for pair in PAIRS)], rows))
    write_json(json_file, report)


if __name__ == "__main__":
    sys.exit(main())
