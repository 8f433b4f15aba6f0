"""What quantized and reproducible all-reduces cost against a plain one: time, and bytes that leave a member.

    python -m benchmarks.numerics

Members of one host reduce an fp32 tensor in every way in turns, so that whatever else the machine does meets all alike.
Times are medians of the slowest member, as ratios to the plain all-reduce. Within a host links are fast and encoding is
all that shows; over links that are slow, bytes decide.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.figures import table, write_json
from collectives import quantize, reproducible
from collectives.errors import RingholdError
from launch.crew import Crew, Desk, Message

PATIENCE = 120.0
_MIB = 1 << 20
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int8, stochastic": {"codec": "int8", "rounding": "stochastic"},
    "int4": {"codec": "int4"},
    "reproducible": {"reproducible": True},
}


def measure(desk: Desk, count: int, rounds: int) -> None:
    """Reduce `count` elements in every way, `rounds` times; report the seconds of each."""
    comm = desk.join()
    given = torch.randn(count, generator=torch.Generator().manual_seed(comm.rank))
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, how in WAYS.items():
            tensor = given.clone()
            comm.barrier()
            begun = time.perf_counter()
            comm.all_reduce(tensor, **how)
            if number:  # the first warms up
                took[way].append(time.perf_counter() - begun)
    for way, seconds in took.items():
        desk.report("measured", way=way, seconds=seconds)
    comm.barrier()
    comm.leave()


def record_bytes(way: str, count: int) -> float:
    """Bytes an element, there and back, that a member sends but for the factor (members - 1) / members."""
    how = WAYS[way]
    if "codec" in how:
        return 2 * quantize.CODECS[how["codec"]].record / quantize.BLOCK
    if "reproducible" in how:
        adder = reproducible.accumulator(torch.float32, count)
        return (adder.up + adder.down) / adder.block
    return 8.0


def run(count: int, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """One row a way."""
    answers: list[Message] = []
    with Crew({"founders": ranks}) as crew:
        for _ in range(ranks):
            crew.start_peer(partial(measure, count=count, rounds=rounds))
        while len(answers) < ranks * len(WAYS):
            heard = crew.receive(PATIENCE)
            failed = [message for _, message in heard if message["type"] in ("failed", "gone")]
            if not heard or (failed and len(answers) < ranks * len(WAYS) - len(heard)):
                raise RingholdError(f"no answer of a member: {failed[0] if failed else 'it is too slow'}")
            answers += [message for _, message in heard if message["type"] == "measured"]
    rows = []
    for way in WAYS:
        times = zip(*(answer["seconds"] for answer in answers if answer["way"] == way), strict=True)
        rows.append({"way": way, "seconds": statistics.median(map(max, times)), "bytes": record_bytes(way, count)})
    return rows


@click.command()
@click.option("--mib", default=16, show_default=True, help="Size of the tensor, MiB.")
@click.option("--ranks", default=2, show_default=True, help="Members.")
@click.option("--rounds", default=9, show_default=True, help="Operations of each kind.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(mib: int, ranks: int, rounds: int, json_file: Path | None) -> None:
    """Measure the cost of quantized and reproducible all-reduces."""
    rows = run(mib * _MIB // 4, ranks, rounds)
    plain = rows[0]
    print(f"all_reduce of {mib} MiB of fp32 over {ranks} members of one host")
    header = ["", "ms", "time", "bytes an element, both ways", "of plain"]
    lines = [
        [
            row["way"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['seconds'] / plain['seconds']:.2f}x",
            f"{row['bytes']:.3f}",
            f"{row['bytes'] / plain['bytes']:.2f}x",
        ]
        for row in rows
    ]
    print(table(header, lines))
    write_json(json_file, {"mib": mib, "ranks": ranks, "rows": rows})


if __name__ == "__main__":
    main()
