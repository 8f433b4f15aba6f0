"""What strangers at every port cost those who belong here: operations a second with and without an attack, by turns.

    python -m benchmarks.strangers

Three members reduce 64 KiB back to back. By turns there is no attack; one on another run of this machine, which takes
the same time of the processors; and one on the members' coordinator and link ports: wrong tokens, garbage, oversized
and slow frames, replayed proofs, foreign links, a thousand idle connections. What counts is the last against the one
before.
"""

import statistics
import sys
import time
from pathlib import Path

import click
import torch

from benchmarks.figures import table, write_json
from launch.crew import Crew, Desk
from tests.harness.strangers import IDLE, Strangers

MEMBERS = 3
STOP = 0
COUNT = 1


def reduce(desk: Desk) -> None:
    """Reduce until told to stop, and count."""
    comm = desk.join(transport="sockets")
    assert comm._epochs is not None
    desk.report("joined", port=comm._epochs.address[1])
    tensor, stop = torch.ones(16384), torch.zeros(1)
    while not stop.item():
        comm.all_reduce(tensor, "max")
        desk.words[COUNT] += 1
        if desk.words[COUNT] % 50 == 0:
            stop.fill_(float(desk.words[STOP]))
            comm.all_reduce(stop, "max")
    comm.leave()


def turn(crew: Crew, seconds: float) -> float:
    """Operations a second of the first member."""
    words = crew.peers[0].words
    before, begun = words[COUNT], time.monotonic()
    while (left := seconds - (time.monotonic() - begun)) > 0:
        for peer, message in crew.receive(min(left, 0.1)):
            if message["type"] in ("failed", "gone") or message.get("event") in ("fenced", "evicted"):
                raise AssertionError(f"member {peer.name} was disturbed: {message}")
    return (words[COUNT] - before) / (time.monotonic() - begun)


@click.command()
@click.option("--turns", default=5, show_default=True, help="Of each kind.")
@click.option("--seconds", default=2.0, show_default=True, help="Of a turn.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(turns: int, seconds: float, json_file: Path | None) -> None:
    """Measure with and without strangers."""
    with Crew({"founders": MEMBERS}) as crew, Crew({}) as decoy:
        for _ in range(MEMBERS):
            crew.start_peer(reduce)
        ports: list[int] = []
        while len(ports) < MEMBERS:
            ports += [message["port"] for _, message in crew.receive(0.1) if message["type"] == "joined"]
        turn(crew, 1.0)
        speeds: dict[str, list[float]] = {"quiet": [], "elsewhere": [], "here": []}
        attacks = 0
        for _ in range(turns):
            speeds["quiet"].append(turn(crew, seconds))
            for where, target in (("elsewhere", decoy), ("here", crew)):
                port = int(target.place[0].rpartition(":")[2])
                with Strangers(port, ports if where == "here" else [port] * MEMBERS, target.place[1]) as crowd:
                    while crowd.done.get("_stand_around", 0) < IDLE:
                        crowd.look()
                    speeds[where].append(turn(crew, seconds))
                    crowd.look()
                    assert not any(crowd.let_in.values()), crowd.let_in
                    attacks += sum(crowd.done.values()) if where == "here" else 0
                turn(crew, 0.5)
        for peer in crew.peers:
            peer.words[STOP] = 1
        while crew.living:
            crew.receive(0.1)
    medians = {where: round(statistics.median(values), 1) for where, values in speeds.items()}
    ratio = round(medians["here"] / medians["elsewhere"], 3)
    report = {**medians, "ratio": ratio, "attacks": attacks, "let_in": 0}
    head = ["operations/s", "no attack", "on another run", "on this run", "ratio of the last two"]
    print(table(head, [["64 KiB", *medians.values(), ratio]]))
    print(f"{attacks} attacks, none was let in, nobody was evicted")
    write_json(json_file, report)


if __name__ == "__main__":
    sys.exit(main())
