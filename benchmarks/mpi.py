"""How fast an all-reduce is over the transport mpi, against the MPI library's own, in the same processes and run.

    mpirun --oversubscribe --with-ft ulfm -n 4 python -m benchmarks.mpi --size 64K 1M 16M 64M

One of ours is what the communicator does for an operation (see `benchmarks.engine`): headers, engine, confirmation,
and in place the copy out of staging. The library's is MPI_Allreduce. They take turns, so that whatever else the
machine does meets both alike; times are medians over the turns of the slowest rank's.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch

from benchmarks.engine import SMALL, UNITS, Ours
from collectives.algorithms import doubling, ring
from collectives.transports.mesh import LinkListener
from collectives.transports.mpi import MpiTransport
from collectives.transports.mpi_world import enter
from collectives.transports.site import Site


class Rank:
    """One rank of the comparison."""

    def __init__(self) -> None:
        world = enter()
        self.comm: Any = world.job.comm
        self._mpi = world.mpi
        self._listener = LinkListener()
        addresses = self.comm.allgather(self._listener.address)
        self.transport = MpiTransport(Site(self._listener, world.job.rank, addresses, b"benchmark", 1, b""))
        self.transport.connect(30)
        self._ours = Ours(self.transport)

    def compare(self, size: int, repeats: int, warmup: int, algorithm: str) -> dict[str, float]:
        """Return milliseconds of the library and of ours, out of place and in place, and the ratios."""
        count = size // 4
        module = {"ring": ring, "doubling": doubling}[algorithm] if algorithm else doubling if size <= SMALL else ring
        schedule = module.all_reduce(self.comm.size, count)
        tensor, output = torch.ones(count), torch.empty(count)
        samples: dict[str, list[float]] = {}

        def note(name: str, seconds: float, value: float) -> None:
            assert value == self.comm.size, f"{name}: {value}"
            samples.setdefault(name, []).append(self.comm.allreduce(seconds, self._mpi.MAX))

        for _ in range(warmup + repeats):
            for inplace in (False, True):
                where = "in place" if inplace else "out of place"
                tensor.fill_(1)
                self.comm.Barrier()
                begun = self._mpi.Wtime()
                self.comm.Allreduce(
                    self._mpi.IN_PLACE if inplace else tensor.numpy(), (tensor if inplace else output).numpy()
                )
                note(f"library {where}", self._mpi.Wtime() - begun, float((tensor if inplace else output)[-1]))
                tensor.fill_(1)
                self.comm.Barrier()
                spent = self._ours.run(schedule, tensor, inplace)
                note(f"ours {where}", spent["all"], float(tensor[-1]) if inplace else float(self.comm.size))
        times = {name: statistics.median(values[warmup:]) * 1e3 for name, values in samples.items()}
        return times | {f"ratio {w}": times[f"ours {w}"] / times[f"library {w}"] for w in ("out of place", "in place")}


def main() -> int:
    """Compare at each size; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["16M", "64M"], help="bytes, with K or M")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--segment", default="", help="bytes of a segment, instead of the transport's own")
    parser.add_argument("--algorithm", choices=["ring", "doubling"], default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = Rank()
    if options.segment:
        rank.transport.segment_bytes = _bytes(options.segment)
    for size in options.size:
        row = rank.compare(_bytes(size), options.repeats, options.warmup, options.algorithm)
        if rank.comm.rank == 0:
            told = {"library": rank.transport.world.library, "ranks": rank.comm.size, "size": size, **row}
            print(json.dumps(told) if options.json else _line(told), flush=True)
    rank.transport.close()
    return 0


def _bytes(text: str) -> int:
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text)


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['library']}, {row['ranks']} ranks, {row['size']:>4}:"]
    for where in ("out of place", "in place"):
        times = f"{row[f'ours {where}']:8.3f} / {row[f'library {where}']:8.3f} ms"
        parts.append(f"{where} {times} = {row[f'ratio {where}']:.2f};")
    return " ".join(parts).rstrip(";")


if __name__ == "__main__":
    sys.exit(main())
