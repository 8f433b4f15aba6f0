"""How long a peer that joins with much state keeps the others from their work, apart from the transfer itself.

    python -m benchmarks.joining                    # 100 MB of state, three members, shm and gloo

Three members reduce 64 KiB back to back and pass a safe point after each; a fourth joins and gets the state. The gap is
the longest time between two results of a member around that. The transfer itself is a sync of as much state among the
same four members, the fourth of which lacks all of it: what is left of the gap is what joining costs.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.figures import table, write_json
from launch.crew import Crew, Desk

MEMBERS = 3
ROUNDS = 4
PATIENCE = 120.0


def work(desk: Desk, transport: str, megabytes: int) -> None:
    """Be a member: reduce, admit, and sync where somebody came."""
    state = {"weights": torch.zeros(megabytes * 125_000, dtype=torch.float64)}
    tensor = torch.ones(16384)
    comm = desk.join(transport=transport)
    desk.report("joined", member=comm.member_id)
    newcomer = not comm.founder
    comm.sync(state)
    gap, last, after = 0.0, time.monotonic(), 2 * newcomer
    while True:
        comm.all_reduce(tensor, "max")
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        if comm.admit():
            comm.sync(state)
            after = 1
        after += after > 0
        if after == 20:
            break
    comm.all_reduce(tensor, "max")
    state["weights"].fill_(float(newcomer))  # one lacks all of it, and the others have the majority
    comm.barrier()
    begun = time.monotonic()
    comm.sync(state)
    desk.report("gap", seconds=gap, transfer=time.monotonic() - begun, newcomer=newcomer)
    comm.leave()


def measure(transport: str, megabytes: int) -> tuple[float, float]:
    """The longest gap of a member, and the seconds of the transfer itself."""
    gaps: list[dict[str, Any]] = []
    with Crew({"founders": MEMBERS}) as crew:
        joined, begun = 0, time.monotonic()
        for _ in range(MEMBERS):
            crew.start_peer(partial(work, transport=transport, megabytes=megabytes))
        while len(gaps) < MEMBERS + 1:
            for _, message in crew.receive(0.1):
                joined += message["type"] == "joined"
                gaps += [message] if message["type"] == "gap" else []
                assert message["type"] != "failed", message
            if joined == MEMBERS:
                joined += 1
                crew.receive(1.0)
                crew.start_peer(partial(work, transport=transport, megabytes=megabytes))
            assert time.monotonic() - begun < PATIENCE, "no end of it"
    return max(one["seconds"] for one in gaps if not one["newcomer"]), max(one["transfer"] for one in gaps)


@click.command()
@click.option("--megabytes", default=100, show_default=True, help="Of state.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(megabytes: int, json_file: Path | None) -> None:
    """Measure the disturbance."""
    rows, report = [], {}
    for transport in ("shm", "gloo"):
        found = [measure(transport, megabytes) for _ in range(ROUNDS)]
        gap, transfer = (statistics.median(column) for column in zip(*found, strict=True))
        report[transport] = {"gap": gap, "transfer": transfer, "apart_from_it": gap - transfer}
        rows.append([transport, *(f"{value:.3f}" for value in report[transport].values())])
    print(f"{megabytes} MB of state, {MEMBERS} members and one that joins; seconds, medians of {ROUNDS}")
    print(table(["", "longest gap", "transfer itself", "apart from it"], rows))
    write_json(json_file, report)


if __name__ == "__main__":
    sys.exit(main())
