"""How fast the engine is against torch's own gloo all-reduce, in the same processes and the same run.

    python benchmarks/engine.py --world 2 4 --size 64K 1M 16M 64M

One of ours is what the communicator does for an operation: a header to the ring successor, checked against the
predecessor's; the engine; the confirmation; and, in place, the copy out of staging. One of torch's is an all-reduce of
an ordinary gloo process group; out of place, a copy to a preallocated output before it. They take turns, so that
whatever else the machine does meets all alike; times are medians of the slowest rank.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from collectives.algorithms import doubling, ring
from collectives.confirm import confirm
from collectives.engine import Engine
from collectives.schedule import Schedule
from collectives.staging import StagingPool, copy_out
from collectives.transports.base import Transport
from collectives.transports.gloo import GlooTransport
from collectives.transports.mesh import LinkListener
from collectives.transports.site import Site
from collectives.transports.sockets import SocketTransport

TRANSPORTS: dict[str, type[GlooTransport] | type[SocketTransport]] = {
    "gloo": GlooTransport,
    "sockets": SocketTransport,
}
UNITS = {"K": 2**10, "M": 2**20}
SMALL = 128 * 1024
CHANNEL = 1
HEADER = bytes(128)
TOKEN = bytes(16)

Sample = dict[str, float]


class Ours:
    """All-reduce by the engine."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._pool = StagingPool()
        self._engine = Engine(self._pool)

    def run(self, schedule: Schedule, tensor: Tensor, inplace: bool) -> Sample:
        """One operation; seconds in all, of the confirmation, and of the copy."""
        transport, world = self._transport, self._transport.size
        begun = time.perf_counter()
        transport.send_note((transport.rank + 1) % world, HEADER, CHANNEL)
        if transport.recv_note((transport.rank - 1) % world, CHANNEL) != HEADER:
            raise AssertionError("the header of another operation")
        staging = self._pool.take(schedule.count, tensor.dtype)
        self._engine.run(schedule, transport, CHANNEL, tensor, staging)
        staged = time.perf_counter()
        confirm(transport, CHANNEL, TOKEN)
        confirmed = time.perf_counter()
        if inplace:
            copy_out(staging, tensor)
        done = time.perf_counter()
        return {"all": done - begun, "confirm": confirmed - staged, "copy": done - confirmed}


class Torchs:
    """All-reduce by an ordinary process group."""

    def __init__(self, path: str, rank: int, world: int) -> None:
        store = dist.FileStore(path)  # type: ignore[attr-defined]
        self.group: Any = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=60))

    def run(self, tensor: Tensor, output: Tensor | None) -> Sample:
        """One operation, into `output` or in place."""
        begun = time.perf_counter()
        if output is not None:
            output.copy_(tensor)
        self.group.allreduce([tensor if output is None else output]).wait()
        return {"all": time.perf_counter() - begun}


Turn = tuple[str, bool]
"""A competitor, and whether in place."""


class Rank:
    """One process of a comparison."""

    def __init__(self, rank: int, world: int, options: "Options", path: str, addresses: list[tuple[str, int]]) -> None:
        self.world = world
        self.torchs = Torchs(path, rank, world)
        self.transports = {
            name: TRANSPORTS[name](Site(options.listener, rank, addresses, b"benchmark", epoch, b""))
            for epoch, name in enumerate(options.transport)
        }
        for transport in self.transports.values():
            transport.connect(30)
        self.ours = {name: Ours(transport) for name, transport in self.transports.items()}

    def take_turns(self, size: int, repeats: int, warmup: int) -> dict[Turn, Sample]:
        """Run all competitors by turns; the medians of each."""
        count = size // 4
        schedule = (doubling if size <= SMALL else ring).all_reduce(self.world, count)
        tensor, output = torch.ones(count), torch.empty(count)
        turns: list[Turn] = [(name, inplace) for inplace in (True, False) for name in ("torch", *self.ours)]
        samples: dict[Turn, list[Sample]] = {turn: [] for turn in turns}
        for repeat in range(warmup + repeats):
            for name, inplace in turns:
                tensor.fill_(1)
                self.torchs.group.barrier().wait()
                if name == "torch":
                    sample = self.torchs.run(tensor, None if inplace else output)
                else:
                    sample = self.ours[name].run(schedule, tensor, inplace)
                if repeat >= warmup:
                    samples[name, inplace].append(sample)
        return {
            turn: {part: statistics.median(sample[part] for sample in of) for part in of[0]}
            for turn, of in samples.items()
        }


def measure(rank: int, world: int, options: "Options", path: str, inbox: Any, results: Any) -> None:
    """Process body: report the medians of each size."""
    torch.set_num_threads(1)
    options.listener = LinkListener()
    results.put((rank, options.listener.address))
    one = Rank(rank, world, options, path, inbox.get())
    for size in options.size:
        results.put((rank, size, one.take_turns(size, options.repeats(size), options.warmup)))
    for transport in one.transports.values():
        transport.close()


def compare(world: int, options: "Options") -> list[dict[str, Any]]:
    """Start the processes and gather a row for each size and transport; times in milliseconds."""
    context = mp.get_context("spawn")
    results, inboxes = context.Queue(), [context.Queue() for _ in range(world)]
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, world, options, f"{folder}/store", inboxes[rank], results) for rank in range(world)]
        processes = [context.Process(target=measure, args=arguments) for arguments in given]
        for process in processes:
            process.start()
        addresses = dict(results.get() for _ in range(world))
        for inbox in inboxes:
            inbox.put([addresses[rank] for rank in range(world)])
        reports = [results.get() for _ in range(world * len(options.size))]
        for process in processes:
            process.join()
    rows = []
    for size in options.size:
        of_size = [medians for _, reported, medians in reports if reported == size]

        def slowest(turn: Turn, part: str = "all", of: Sequence[Any] = of_size) -> float:
            return 1000 * max(float(medians[turn][part]) for medians in of)

        for name in options.transport:
            row: dict[str, Any] = {"world": world, "bytes": size, "transport": name}
            for inplace, how in ((True, "in"), (False, "out")):
                row[f"ours_{how}"] = slowest((name, inplace))
                row[f"torch_{how}"] = slowest(("torch", inplace))
                row[f"ratio_{how}"] = row[f"torch_{how}"] / row[f"ours_{how}"]
            row["confirm"] = slowest((name, True), "confirm")
            row["copy"] = slowest((name, True), "copy")
            rows.append(row)
    return rows


def size_of(text: str) -> int:
    """Bytes from `64K`, `1M`."""
    return int(text[:-1]) * UNITS[text[-1].upper()]


class Options(argparse.Namespace):
    """Parsed arguments."""

    world: list[int]
    size: list[int]
    transport: list[str]
    least: int
    warmup: int
    json: bool
    listener: LinkListener
    """Of this process."""

    def repeats(self, size: int) -> int:
        """Fewer turns for large tensors."""
        return max(self.least, min(60, self.least * 64 * 2**20 // size))


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", type=size_of, nargs="+", default=[size_of(s) for s in ("64K", "1M", "16M", "64M")])
    parser.add_argument("--transport", nargs="+", choices=list(TRANSPORTS), default=list(TRANSPORTS))
    parser.add_argument("--least", type=int, default=6, help="turns for the largest size")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(namespace=Options())
    rows = [row for world in options.world for row in compare(world, options)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':>5} {'':>9} {'':>9} | {'in place, ms':^25} | {'out of place, ms':^25} | {'of which, ms':^16}")
    print(f"{'ranks':>5} {'KiB':>9} {'transport':>9} | {'ours':>8} {'torch':>8} {'ratio':>7} ", end="")
    print(f"| {'ours':>8} {'torch':>8} {'ratio':>7} | {'confirm':>8} {'copy':>7}")
    for row in rows:
        print(f"{row['world']:>5} {row['bytes'] // 1024:>9} {row['transport']:>9} ", end="")
        for how in ("in", "out"):
            print(f"| {row[f'ours_{how}']:>8.3f} {row[f'torch_{how}']:>8.3f} {row[f'ratio_{how}']:>6.2f}x ", end="")
        print(f"| {row['confirm']:>8.3f} {row['copy']:>7.3f}")


if __name__ == "__main__":
    main()
