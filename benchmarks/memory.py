"""How much memory an all-reduce takes besides the caller's tensors: growth of the resident set, in steady state.

    python -m benchmarks.memory

Each member reduces a tensor of 64 MiB again and again, in place and out of place. Counted is the peak of its resident
memory over what it held when only the tensor was there, less the result that it was given. Exits with 1 where that is
more than twice the tensor and the slack below. Half precision is reduced in single precision, which takes twice its
size by itself.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.figures import table, write_json
from collectives.errors import RingholdError
from launch.crew import Crew, Desk, Message

LIMIT = 2.0
SLACK = 24 << 20
"""Bytes that do not grow with the tensor: scratch memory and temporaries of some segments of 1 MiB, what the heap keeps
of them, threads and sockets."""
WARM_UP, MEASURED = 3, 5
"""Operations."""
PATIENCE = 120.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MIB = 1 << 20


def measure(desk: Desk, size: int, dtype: str, inplace: bool) -> None:
    """Reduce a tensor of `size` bytes and report the memory that it took."""
    comm = desk.join()
    small = torch.ones(1 << 14, dtype=DTYPES[dtype])
    for _ in range(2):  # what is loaded with the first operation is no staging
        comm.all_reduce(small, "avg", inplace=inplace)
    tensor = torch.ones(size // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])
    comm.barrier()
    alone = _status("VmRSS")
    for _ in range(WARM_UP):
        comm.all_reduce(tensor, "avg", inplace=inplace)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(MEASURED):
        comm.all_reduce(tensor, "avg", inplace=inplace)
    comm.barrier()
    desk.report("measured", peak=_status("VmHWM") - alone, rest=_status("VmRSS") - alone)
    if not torch.equal(tensor, torch.ones_like(tensor)):
        raise RingholdError("the average of ones is not one")
    comm.barrier()
    comm.leave()


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def run(size: int, dtype: str, ranks: int, inplace: bool) -> dict[str, Any]:
    """One row: the member with the highest peak."""
    answers: list[Message] = []
    with Crew({"founders": ranks}) as crew:
        for _ in range(ranks):
            crew.start_peer(partial(measure, size=size, dtype=dtype, inplace=inplace))
        while len(answers) < ranks:
            heard = crew.receive(PATIENCE)
            failed = [message for _, message in heard if message["type"] in ("failed", "gone")]
            if failed or not heard:
                raise RingholdError(f"no answer of a member: {failed[0] if failed else 'it is too slow'}")
            answers += [message for _, message in heard if message["type"] == "measured"]
    given = 0 if inplace else size
    staging = max(answer["peak"] for answer in answers) - given
    return {
        "dtype": dtype,
        "ranks": ranks,
        "inplace": inplace,
        "peak_mib": round(max(answer["peak"] for answer in answers) / _MIB, 1),
        "rest_mib": round(max(answer["rest"] for answer in answers) / _MIB, 1),
        "staging_mib": round(staging / _MIB, 1),
        "ratio": round(staging / size, 2),
        "ok": staging <= LIMIT * size + SLACK,
    }


@click.command()
@click.option("--mib", default=64, show_default=True, help="Size of the tensor, MiB.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(mib: int, json_file: Path | None) -> None:
    """Measure the memory that an all-reduce takes besides the caller's."""
    rows = [run(mib * _MIB, dtype, ranks, inplace) for dtype, ranks, inplace in product(DTYPES, (2, 4), (True, False))]
    print(f"all_reduce of {mib} MiB; MiB of resident memory over the tensor alone, in steady state")
    print(f"limit: {LIMIT:g}x and {SLACK // _MIB} MiB")
    header = ["dtype", "ranks", "", "peak", "between", "staging", "of the tensor", ""]
    print(
        table(
            header,
            [
                [
                    row["dtype"],
                    row["ranks"],
                    "in place" if row["inplace"] else "out of place",
                    row["peak_mib"],
                    row["rest_mib"],
                    row["staging_mib"],
                    f"{row['ratio']:.2f}x",
                    "ok" if row["ok"] else "OVER",
                ]
                for row in rows
            ],
        )
    )
    write_json(json_file, {"mib": mib, "limit": LIMIT, "slack_mib": SLACK // _MIB, "rows": rows})
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
