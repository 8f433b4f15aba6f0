"""All-reduce over real links of a limited rate: which part of the ideal it reaches, and whether the simulator knows.

    python -m benchmarks.links                       # 4 hosts of 400 Mbit/s, 1 and 8 MiB; needs root
    python -m benchmarks.links --algorithms          # each algorithm, against what the simulator predicts

Members in network namespaces (`launch.network`) run all-reduces by turns over our transports and over torch's own gloo,
in the same processes. No all-reduce of S bytes takes less than 2 (n-1)/n S/B over links of B bytes a second; what
counts is the part of this bound that is reached, by the slowest rank. A turn is a few operations in a row after a
barrier, the first of them not counted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.figures import table, write_json
from collectives import choice
from collectives.communicator import Communicator
from collectives.errors import RingholdError
from collectives.schedule import Schedule, Step
from collectives.simulate import simulate
from collectives.topology import Link, flat
from collectives.transports.sockets import FAR_SEGMENT_BYTES
from launch.crew import Crew, Desk
from launch.network import Network

TRANSPORTS = ("sockets", "gloo")
_PATIENCE = 120.0
_SHIFTS = 8

Run = Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Contest:
    """What is measured: by whom, with which sizes (bytes), how often."""

    competitors: tuple[str, ...]
    """A transport, TRANSPORT/ALGORITHM, TRANSPORT/+CODEC, or "torch"."""
    sizes: tuple[int, ...]
    turns: int
    in_a_row: int


class Member:
    """One process of a contest."""

    def __init__(self, desk: Desk, places: dict[str, tuple[str, str, str]], folder: Path) -> None:
        self._desk = desk
        self._comms = {
            transport: Communicator.join(*place, transport=transport, options=desk.options)
            for transport, place in places.items()
        }
        comm = next(iter(self._comms.values()))
        self._rank, self._world = comm.rank, comm.size
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=desk.options.listen)]
        options._timeout = timedelta(seconds=_PATIENCE)
        store = dist.FileStore(str(folder / "store"))  # type: ignore[attr-defined]
        self._torch: Any = dist.ProcessGroupGloo(store, self._rank, self._world, options)

    def take_turns(self, contest: Contest) -> None:
        """Measure the links, then run everything and report the seconds of each operation."""
        self._measure(max(contest.sizes))
        for size in contest.sizes:
            tensor = torch.ones(size // 4)
            for _ in range(contest.turns):
                for name in contest.competitors:
                    run, align = self._competitor(name)
                    align()
                    times = []
                    for _ in range(contest.in_a_row):
                        tensor.fill_(1)
                        begun = time.perf_counter()
                        run(tensor)
                        times.append(round(time.perf_counter() - begun, 6))
                    if wrong := int((tensor - self._world).abs().gt(0.02 * self._world).sum()):
                        raise AssertionError(f"{name} summed {wrong} elements of {size} bytes wrongly")
                    self._desk.report("turn", size=size, competitor=name, times=times[1:])

    def _measure(self, size: int) -> None:
        """Report the latency of an idle link, and the rate at which all links at once carry data in both directions."""
        comm = next(iter(self._comms.values()))
        links = comm.measure(2**16)
        latency = statistics.median(
            links.latency[a][b] for a in range(self._world) for b in range(self._world) if a != b
        )
        count = size // 4
        buffer, schedule = torch.zeros(self._world * count), to_the_next(self._world, count)
        seconds = []
        for _ in range(_SHIFTS):
            comm.barrier()
            begun = time.perf_counter()
            comm.run(schedule, buffer)
            seconds.append(time.perf_counter() - begun)
        took = statistics.median(seconds) - besides(self._world, latency) - latency
        self._desk.report("links", latency=latency, bandwidth=size / took)

    def close(self) -> None:
        """Leave all runs."""
        for comm in self._comms.values():
            comm.leave()

    def _competitor(self, name: str) -> tuple[Run, Callable[[], object]]:
        """How it does an all-reduce, and its barrier."""
        if name == "torch":
            return lambda tensor: self._torch.allreduce([tensor]).wait(), lambda: self._torch.barrier().wait()
        transport, _, how = name.partition("/")
        comm = self._comms[transport]
        keywords: dict[str, Any] = {}
        if how:
            keywords = {"codec": how[1:]} if how.startswith("+") else {"algorithm": how}
        return lambda tensor: comm.all_reduce(tensor, **keywords), comm.barrier


def to_the_next(world: int, count: int) -> Schedule:
    """Each rank sends `count` elements to the next one: what links carry, without anything that depends on them."""
    part = [((rank * count, (rank + 1) * count),) for rank in range(world)]
    step = Step.of((rank, (rank + 1) % world, *part[rank][0], False) for rank in range(world))
    return Schedule.from_steps(
        "shift", "shift", world, world * count, [step], part, [part[rank - 1] for rank in range(world)]
    )


def besides(world: int, latency: float) -> float:
    """Seconds that the simulator leaves out: header and rounds of the confirmation, one message behind the other."""
    return latency * (1 + (world - 1).bit_length())


@dataclass(slots=True)
class Report:
    """What the members said."""

    latency: float = 0.0
    """Of an idle link, seconds."""
    bandwidth: float = 0.0
    """Of a link while all are busy in both directions, bytes a second."""
    times: dict[tuple[int, str], dict[int, list[float]]] = field(default_factory=dict)
    """Seconds of all operations, by size and competitor, then by member."""

    def medians(self) -> dict[tuple[int, str], float]:
        """Median seconds of the slowest rank, by size and competitor."""
        return {
            key: statistics.median(max(ranks) for ranks in zip(*by_rank.values(), strict=True))
            for key, by_rank in self.times.items()
        }


def hold(contest: Contest, network: Network) -> Report:
    """Let members of all hosts compete.

    Raises:
        RingholdError: a member failed, or nothing was heard for two minutes.

    """
    transports = dict.fromkeys(name.partition("/")[0] for name in contest.competitors if name != "torch")
    with ExitStack() as stack:
        options = {"founders": network.size, "heartbeat_timeout": 10.0}
        crews = {name: stack.enter_context(Crew(options, network)) for name in transports}
        places = {name: crew.place for name, crew in crews.items()}
        crew = next(iter(crews.values()))

        def work(desk: Desk) -> None:
            member = Member(desk, places, crew.folder)
            member.take_turns(contest)
            member.close()

        for _ in range(network.size):
            crew.start_peer(work)
        return _listen(crew, network.size)


def _listen(crew: Crew, members: int) -> Report:
    report = Report()
    while members:
        heard = crew.receive(_PATIENCE)
        if not heard:
            raise RingholdError(f"no member has said anything for {_PATIENCE:g} s; {crew.status()}")
        for peer, message in heard:
            if message["type"] == "turn":
                by_rank = report.times.setdefault((message["size"], message["competitor"]), {})
                by_rank.setdefault(peer.name, []).extend(message["times"])
            elif message["type"] == "links":
                report.latency, report.bandwidth = message["latency"], message["bandwidth"]
            elif message["type"] == "failed":
                raise RingholdError(f"peer {peer.name}: {message['error']}: {message['message']}")
            elif message["type"] == "gone":
                members -= 1
    return report


def compare(args: "Arguments", network: Network) -> list[dict[str, Any]]:
    """Our transports and torch's gloo, and what a codec of one byte an element gains."""
    best = args.transport[0]
    competitors = (*args.transport, "torch", *(f"{best}/+{codec}" for codec in args.codec))
    found = hold(Contest(competitors, tuple(args.size), args.turns, args.in_a_row), network).medians()
    rows = []
    for (size, name), seconds in found.items():
        ideal = 2 * (network.size - 1) / network.size * size / args.rate
        rows.append(
            {
                "bytes": size,
                "competitor": name,
                "ms": round(1000 * seconds, 2),
                "of_ideal": round(ideal / seconds, 3),
                "times_as_fast_as_fp32": round(found[size, best] / seconds, 2),
            }
        )
    return rows


def predict(args: "Arguments", network: Network) -> list[dict[str, Any]]:
    """Each algorithm, measured, and simulated on links as they were measured."""
    transport, world = args.transport[0], network.size
    names = args.algorithm or [name for name in choice.names("all_reduce") if name != "hierarchical"]
    competitors = tuple(f"{transport}/{name}" for name in names)
    report = hold(Contest(competitors, tuple(args.size), args.turns, args.in_a_row), network)
    topology = flat(world, Link(report.latency, report.bandwidth))
    rows = []
    for (size, competitor), seconds in report.medians().items():
        name = competitor.partition("/")[2]
        schedule = choice.build("all_reduce", name, world, size // 4)
        predicted = besides(world, report.latency) + simulate(schedule, topology, segment_bytes=FAR_SEGMENT_BYTES).time
        rows.append(
            {
                "bytes": size,
                "algorithm": name,
                "measured_ms": round(1000 * seconds, 2),
                "predicted_ms": round(1000 * predicted, 2),
                "predicted_by_measured": round(predicted / seconds, 3),
                "link_us": round(1e6 * report.latency),
                "link_MB_s": round(report.bandwidth / 1e6, 1),
            }
        )
    return rows


class Arguments(argparse.Namespace):
    """Parsed arguments."""

    hosts: int
    rate: float
    size: list[int]
    transport: list[str]
    codec: list[str]
    turns: int
    in_a_row: int
    algorithms: bool
    algorithm: list[str] | None
    json: Path | None


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", type=float, default=50e6, help="bytes a second of a link, in each direction")
    parser.add_argument("--size", type=int, nargs="+", default=[2**20, 2**23], help="bytes")
    parser.add_argument("--transport", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--codec", nargs="*", default=["int8"], help="with the first transport")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--in-a-row", type=int, default=4, help="operations a turn, the first is not counted")
    parser.add_argument("--algorithms", action="store_true", help="all algorithms, against the simulator")
    parser.add_argument("--algorithm", nargs="+", help="only these")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args(namespace=Arguments())
    with Network(args.hosts, args.rate) as network:
        rows = (predict if args.algorithms else compare)(args, network)
    print(table(tuple(rows[0]), [tuple(row.values()) for row in rows]))
    write_json(args.json, {"hosts": args.hosts, "rate": args.rate, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
