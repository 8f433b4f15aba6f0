"""Is a simulated time the time that real processes take on the same network, emulated?

    python -m benchmarks.emulation                        # all_reduce by every algorithm; 2, 4 and 8 ranks; a minute
    python -m benchmarks.emulation --kinds all_reduce broadcast all_gather reduce_scatter --json

The processes run the engine over an emulated transport whose links are slow enough that two cores can keep up with
eight ranks. Printed are the simulated and the measured time (the best of a few rounds: what else the machine does only
adds) and their ratio; then by how much the bidirectional ring beats the ring where each link between neighbours has a
rate of its own in each direction.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from benchmarks.figures import table
from collectives import choice, topology
from collectives.engine import Engine
from collectives.schedule import Schedule
from collectives.simulate import simulate
from collectives.staging import StagingPool
from collectives.topology import Link, Topology
from collectives.transports.emulated import emulate
from collectives.transports.mesh import LinkListener
from collectives.transports.site import Site
from collectives.transports.sockets import SocketTransport
from launch.child import die_with_parent

KINDS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter")
NETWORKS: dict[str, Callable[[int, Link], Topology]] = {
    "flat": topology.flat,
    "mesh": lambda world, link: topology.mesh(world, link.scaled(1 / (world - 1))),  # a rank's links carry what one did
}
SETTLE = 0.1
"""Seconds between asking the ranks to run and the instant at which they all begin."""
TIMEOUT = 60.0
_KEY, _NONCE = b"b" * 32, secrets.token_bytes(8)
_context = multiprocessing.get_context("fork")


class Case(NamedTuple):
    """What the ranks run, on how many elements; `begin` is an instant of the monotonic clock."""

    kind: str
    algorithm: str
    elements: int
    begin: float


class Ranks:
    """Processes on one emulated network; a context manager."""

    def __init__(self, network: Topology) -> None:
        self.world = network.ranks
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.world):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_rank, args=(rank, network, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        addresses = self._gather()
        for pipe in self._pipes:
            pipe.send(addresses)
        self._gather()

    def measure(self, kind: str, algorithm: str, count: int, rounds: int) -> float:
        """Seconds from the first rank's beginning to the last one's end; the least of some rounds."""
        best = float("inf")
        for _ in range(rounds):
            case = Case(kind, algorithm, count, time.monotonic() + SETTLE)
            for pipe in self._pipes:
                pipe.send(case)
            spans = self._gather()
            best = min(best, max(end for _, end in spans) - min(begin for begin, _ in spans))
        return best

    def _gather(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} did not answer in {TIMEOUT} s")
            answers.append(pipe.recv())
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(5.0)
            process.kill()
        for pipe in self._pipes:
            pipe.close()


def _rank(rank: int, network: Topology, pipe: Connection, parent: int) -> None:
    """One process: link with the others, then run what the pipe asks for."""
    die_with_parent(parent)
    torch.set_num_threads(1)
    listener = LinkListener()
    pipe.send(listener.address)
    site = Site(listener, rank, pipe.recv(), _KEY, 1, _NONCE)
    transport = emulate(SocketTransport(site), network, _KEY, 1, _NONCE)
    transport.connect(TIMEOUT)
    engine = Engine(StagingPool())
    pipe.send("linked")
    while (case := pipe.recv()) is not None:
        schedule = choice.build(case.kind, case.algorithm, network.ranks, case.elements)
        source = torch.ones(sum(stop - start for start, stop in schedule.held(rank)))
        program = engine.program(schedule, transport, source.dtype, source.dtype)
        staging = torch.zeros(program.footprint)
        time.sleep(max(0.0, case.begin - time.monotonic()))
        begin = time.monotonic()
        engine.run(schedule, transport, 1, source, staging)
        pipe.send((begin, time.monotonic()))
    transport.close()


def compare(network: Topology, kinds: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each algorithm on this network; times in seconds."""
    rows = []
    with Ranks(network) as ranks:
        for kind in kinds:
            for algorithm in options.algorithms or choice.names(kind):
                schedule = choice.build(kind, algorithm, ranks.world, options.size // 4)
                simulated = predicted(schedule, network, options)
                measured = ranks.measure(kind, algorithm, schedule.count, options.rounds)
                rows.append(
                    {
                        "network": network.name,
                        "ranks": ranks.world,
                        "kind": kind,
                        "algorithm": algorithm,
                        "simulated": simulated,
                        "measured": measured,
                        "ratio": measured / simulated,
                        "by_steps": predicted(schedule, network, options, exact=False),
                    }
                )
    return rows


def predicted(schedule: Schedule, network: Topology, options: argparse.Namespace, exact: bool = True) -> float:
    """Simulated seconds."""
    return simulate(schedule, network, reduce_rate=options.reduce_rate, exact=exact).time


def duplex(options: argparse.Namespace, link: Link) -> dict[str, Any]:
    """Ring and bidirectional ring where each neighbour link has its own rate each way; 8 ranks."""
    count = options.size // 4
    with Ranks(topology.ring(8, link)) as ranks:
        one_way, both = (ranks.measure("all_reduce", name, count, options.rounds) for name in ("ring", "bidirectional"))
    return {"ranks": 8, "ring": one_way, "bidirectional": both, "ratio": one_way / both}


def main() -> None:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["all_reduce"])
    parser.add_argument("--algorithms", nargs="+", help="default: all of the kind")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=8 * 2**20, help="bytes of the buffer")
    parser.add_argument("--bandwidth", type=float, default=25e6, help="bytes a second of each rank")
    parser.add_argument("--latency", type=float, default=1e-3, help="seconds")
    parser.add_argument("--reduce-rate", type=float, default=2e9, help="bytes a second that a rank reduces here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    link = Link(options.latency, options.bandwidth)
    rows = []
    for name in options.networks:
        for world in options.ranks:
            rows += compare(NETWORKS[name](world, link), options.kinds, options)
    speedup = duplex(options, link)
    if options.json:
        print(json.dumps({"rows": rows, "duplex": speedup}, indent=2))
        return
    header = (
        "network",
        "ranks",
        "kind",
        "algorithm",
        "simulated, ms",
        "measured, ms",
        "measured/simulated",
        "by steps",
    )
    cells = [
        (
            *(row[what] for what in ("network", "ranks", "kind", "algorithm")),
            *(f"{1000 * row[what]:.1f}" for what in ("simulated", "measured")),
            f"{row['ratio']:.3f}",
            f"{1000 * row['by_steps']:.1f}",
        )
        for row in rows
    ]
    print(table(header, cells))
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    print(f"worst: {worst['kind']} by {worst['algorithm']} on {worst['ranks']} ranks, {worst['ratio']:.3f}")
    print(
        f"duplex ring of {speedup['ranks']}: ring {1000 * speedup['ring']:.1f} ms, bidirectional "
        f"{1000 * speedup['bidirectional']:.1f} ms, {speedup['ratio']:.2f}x"
    )


if __name__ == "__main__":
    main()
