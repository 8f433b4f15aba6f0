"""What fault tolerance costs while nothing fails: an all-reduce taken apart, and the coordinator's messages counted.

    python -m benchmarks.overhead --peers 2 4 --transport shm sockets --size 64K 16M

Five forms of one all-reduce take turns in the same processes, each with what recovery needs and the one before lacks:
the engine alone, into its staging; headers compared before it; confirmed after it; copied out of staging into the
caller's tensor; and the communicator's own call, in place, with the membership's bookkeeping. Without recovery the
engine could write the caller's tensor, so all but the first column is its price. The coordinator must hear nothing.
"""

import argparse
import statistics
import time
from collections import Counter

import torch
from torch import Tensor

from benchmarks.figures import table
from collectives import choice
from collectives.communicator import Communicator
from collectives.confirm import confirm
from collectives.engine import Engine
from collectives.membership.protocol import Message
from collectives.membership.wire import Channel
from collectives.staging import StagingPool, copy_out
from collectives.transports.base import Transport, channel_of
from launch import crew as crews
from launch.bench_request import parse_size
from launch.crew import Crew, Desk

FORMS = ("engine", "headers", "confirm", "copy out", "communicator")
_HEADER = bytes(128)
_CHANNEL = channel_of("overhead")
_PATIENCE = 120.0

Medians = dict[int, list[float]]
"""Seconds by size in bytes and form."""


class Apart:
    """An all-reduce of `tensor` in the five forms."""

    def __init__(self, comm: Communicator, transport: Transport, tensor: Tensor) -> None:
        self._comm, self._transport, self._tensor = comm, transport, tensor
        self._pool = StagingPool()
        self._engine = Engine(self._pool)
        world, size = transport.size, tensor.nbytes
        name = choice.choose("all_reduce", world, size, profile=self.transport_name(transport))
        self._schedule = choice.build("all_reduce", name, world, tensor.numel())

    @staticmethod
    def transport_name(transport: Transport) -> str:
        """The name under which a transport is joined."""
        return type(transport).__name__.removesuffix("Transport").lower()

    def run(self, form: int) -> float:
        """Run once and return the seconds; `form` is a place in FORMS."""
        begun = time.perf_counter()
        if form == len(FORMS) - 1:
            self._comm.all_reduce(self._tensor)
            return time.perf_counter() - begun
        transport, tensor = self._transport, self._tensor
        program = self._engine.program(self._schedule, transport, tensor.dtype, tensor.dtype)
        staging = self._pool.take(program.footprint, tensor.dtype)
        agree = self._agree if form >= 1 else None
        self._engine.run(self._schedule, transport, _CHANNEL, tensor, staging, agree=agree)
        if form >= 2:
            confirm(transport, _CHANNEL, b"overhead")
        if form >= 3:
            copy_out(staging[: tensor.numel()], tensor)
        return time.perf_counter() - begun

    def _agree(self) -> None:
        transport, world = self._transport, self._transport.size
        transport.send_note((transport.rank + 1) % world, _HEADER, _CHANNEL)
        transport.recv_note((transport.rank - 1) % world, _CHANNEL)


def member(desk: Desk, transport: str, sizes: list[int], turns: int) -> None:
    """A peer's work: the medians of each form at each size, and what the coordinator was sent meanwhile."""
    sent = count_messages()
    with desk.join(transport=transport) as comm:
        comm.barrier()
        inner = comm._epochs and comm._epochs.transport(comm.epoch)
        assert isinstance(inner, Transport)
        for size in sizes:
            apart = Apart(comm, inner, torch.ones(size // 4))
            samples = take_turns(comm, apart, turns)
            desk.report("medians", size=size, medians=[statistics.median(of_form) for of_form in samples])
        sent.clear()
        for _ in range(turns * 20):
            comm.all_reduce(torch.ones(1000))
        heard = {name: count for name, count in sent.items() if name != "Beat"}
        comm.barrier()
        desk.report("done", operations=turns * 20, heard=heard)


def take_turns(comm: Communicator, apart: Apart, turns: int) -> list[list[float]]:
    """Seconds of each turn of each form; the first turn is left out."""
    samples: list[list[float]] = [[] for _ in FORMS]
    for turn in range(turns + 1):
        for form in range(len(FORMS)):
            comm.barrier()
            seconds = apart.run(form)
            if turn:
                samples[form].append(seconds)
    return samples


def count_messages() -> Counter[str]:
    """Count what this process sends to a coordinator from now on, by kind of message."""
    sent: Counter[str] = Counter()
    send = Channel.send

    def counting(self: Channel, message: Message) -> None:
        sent[type(message).__name__] += 1
        send(self, message)

    Channel.send = counting  # type: ignore[method-assign]
    return sent


def measure(
    peers: int, transport: str, sizes: list[int], turns: int
) -> tuple[dict[int, list[float]], list[crews.Message]]:
    """Return the medians of the slowest peer by size and form, and each peer's count of messages."""
    with Crew({"founders": peers, "heartbeat_timeout": 10.0}) as crew:
        for _ in range(peers):
            crew.start_peer(lambda desk: member(desk, transport, sizes, turns))
        medians: Medians = {size: [0.0] * len(FORMS) for size in sizes}
        done: list[crews.Message] = []
        end = time.monotonic() + _PATIENCE
        while len(done) < peers:
            if time.monotonic() > end:
                raise TimeoutError(f"no result of {peers} peers over {transport} in {_PATIENCE:g} s\n{crew.status()}")
            for _, message in crew.receive(1.0):
                match message["type"]:
                    case "medians":
                        slowest = map(max, zip(medians[message["size"]], message["medians"], strict=True))
                        medians[message["size"]] = list(slowest)
                    case "done":
                        done.append(message)
                    case "failed":
                        raise RuntimeError(f"{message['error']}: {message['message']}")
        return medians, done


def report(worlds: list[int], transports: list[str], sizes: list[int], turns: int) -> int:
    """Print the table; returns how many messages the coordinator was sent for operations, which should be none."""
    rows, operations, messages = [], 0, 0
    for peers in worlds:
        for transport in transports:
            medians, done = measure(peers, transport, sizes, turns)
            for size, of_size in medians.items():
                rows.append([f"{transport} x {peers}", size // 1024, *(f"{1e6 * seconds:.0f}" for seconds in of_size)])
            operations += sum(one["operations"] for one in done)
            messages += sum(sum(one["heard"].values()) for one in done)
    print("all_reduce, medians in us; each column has what the one before it has, and its own:")
    print(table(["transport x ranks", "KiB", *FORMS], rows))
    print(f"messages to the coordinator beside heartbeats: {messages} for {operations} operations")
    return messages


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--transport", nargs="+", default=["shm", "sockets", "gloo"])
    parser.add_argument("--size", type=parse_size, nargs="+", default=[parse_size(text) for text in ("64K", "16M")])
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    return 1 if report(options.peers, options.transport, options.size, options.turns) else 0


if __name__ == "__main__":
    raise SystemExit(main())
