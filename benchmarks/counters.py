"""Bytes of attention on the wire, by the kernel's own counters of real interfaces, against the closed formulas.

Called as `python -m benchmarks.attention counters`; needs root. Each rank is a process on a host of its own, a network
namespace (`launch.network`), and reads what its interface has sent and received before and after each pass. An
interface counts what the kernel hands it: packets of up to 64 KiB, which no cable here cuts into smaller ones, each
with one header of Ethernet, IPv4 and TCP, which is taken off. What is left are the bytes of the formulas, and of our
own frames, headers, confirmations and heartbeats, for which a hundredth is allowed.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.figures import table
from collectives.communicator import Communicator
from collectives.errors import RingholdError
from launch.crew import Crew, Desk
from launch.network import Network
from parallel.attention.api import attention_backward, attention_forward
from parallel.attention.formulas import RankBytes, rank_bytes
from parallel.attention.layout import SCHEMES, Problem
from parallel.attention.shares import Balance, Run, Share

PACKET = 14 + 20 + 20 + 12
"""Bytes of the headers of a packet: Ethernet, IPv4, TCP and its timestamps."""
NO_PROBES = Path("/proc/sys/net/ipv4/tcp_early_retrans")
"""Set to 0, TCP on this host repeats nothing just because the other end is slow to answer, as on a busy machine."""
ALLOWED = 0.01
HEADS, KV_HEADS, DIM = 8, 4, 64
_PATIENCE = 120.0


class Counters(NamedTuple):
    """Of all interfaces of this host but the loopback: bytes without headers of packets."""

    sent: int
    received: int

    @classmethod
    def read(cls) -> "Counters":
        """Of the namespace of the calling thread; proc_pid_net(5)."""
        sent = received = 0
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
            name, _, numbers = line.partition(":")
            if name.strip() != "lo":
                fields = [int(number) for number in numbers.split()]
                received += fields[0] - PACKET * fields[1]
                sent += fields[8] - PACKET * fields[9]
        return cls(sent, received)


def count(given: argparse.Namespace) -> int:
    """Let all hosts attend by each scheme; 1 if a rank's bytes are off in a direction."""
    (ranks,) = given.ranks or (4,)
    with Network(ranks) as network, Crew({"founders": ranks, "heartbeat_timeout": 10.0}, network) as crew:
        length = given.length or 2048

        def work(desk: Desk) -> None:
            NO_PROBES.write_text("0")
            with desk.join(transport="sockets") as comm:
                for scheme in given.scheme or SCHEMES:
                    for row in _passes(comm, scheme, length):
                        desk.report("counted", **row)

        for _ in range(ranks):
            crew.start_peer(work)
        rows = _heard(crew, ranks)
    if given.json:
        for row in rows:
            print(json.dumps(row))
    else:
        _show(rows)
    return int(any(row["off"] > ALLOWED for row in rows))


def _passes(comm: Communicator, scheme: str, length: int) -> list[dict[str, Any]]:
    """Forward and backward of one scheme; what the formulas and this rank's interfaces say."""
    problem = _problem(comm.size, scheme, length)
    queries, keys = problem.queries[comm.rank].rows, problem.keys[comm.rank].rows
    q, grad = (torch.randn(1, HEADS, queries, DIM) for _ in range(2))
    k, v = (torch.randn(1, KV_HEADS, keys, DIM) for _ in range(2))
    before = _quiet(comm)
    out, lse = attention_forward(q, k, v, problem, comm)
    between = _quiet(comm)
    attention_backward((q, k, v, grad, out, lse), problem, comm)
    after = _quiet(comm)
    return [
        _row(comm.rank, problem, backward, begun, ended)
        for backward, begun, ended in ((False, before, between), (True, between, after))
    ]


def _quiet(comm: Communicator) -> Counters:
    """What was counted when nothing is under way."""
    comm.barrier()
    found = Counters.read()
    comm.barrier()
    return found


def _problem(world: int, scheme: str, length: int) -> Problem:
    shares = Balance().shares(length, world)
    queries = shares
    if scheme == "tree":
        rows = length // world
        queries = tuple(Share((Run(0, rows, 0, 1, 0),), (rows,)) for _ in shares)
    columns = 2 if world % 2 == 0 else 1
    return Problem(1, HEADS, KV_HEADS, DIM, torch.float32, queries, shares, False, 0.125, scheme, columns, parts=2)


def _row(rank: int, problem: Problem, backward: bool, before: Counters, after: Counters) -> dict[str, Any]:
    due: RankBytes = rank_bytes(problem, rank, backward)
    found = Counters(after.sent - before.sent, after.received - before.received)
    off = max(abs(mine / formula - 1) for mine, formula in zip(found, due, strict=True))
    return {
        "scheme": problem.scheme,
        "pass": "backward" if backward else "forward",
        "rank": rank,
        "sent": found.sent,
        "sent_formula": due.sent,
        "received": found.received,
        "received_formula": due.received,
        "off": off,
    }


def _heard(crew: Crew, members: int) -> list[dict[str, Any]]:
    """All rows of all members, in order."""
    rows = []
    while members:
        heard = crew.receive(_PATIENCE)
        if not heard:
            raise RingholdError(f"no member has said anything for {_PATIENCE:g} s; {crew.status()}")
        for peer, message in heard:
            if message.pop("type") == "counted":
                message.pop("time")
                rows.append(message)
            elif "error" in message:
                raise RingholdError(f"peer {peer.name}: {message['error']}: {message['message']}")
            elif "code" in message:
                members -= 1
    return sorted(rows, key=lambda row: (SCHEMES.index(row["scheme"]), row["pass"] == "backward", row["rank"]))


def _show(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        pairs = [(row[way], row[f"{way}_formula"]) for way in ("sent", "received")]
        columns = [f"{value:,}" for pair in pairs for value in pair]
        cells.append((row["scheme"], row["pass"], row["rank"], *columns, f"{100 * row['off']:.3f}%"))
    print(table(("scheme", "pass", "rank", "sent", "formula", "received", "formula", "off"), cells))
    print(f"worst: {100 * max(row['off'] for row in rows):.3f}% off, of {100 * ALLOWED:g}% allowed")
