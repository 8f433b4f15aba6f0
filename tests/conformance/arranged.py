"""Programs of arranged members: they measure, optimize, reduce, come and die as the test says."""

import time
from typing import Any

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.transports.emulated import EmulatedTransport
from tests.conformance.losses import dying
from tests.harness.peer import Peer, bits


def arranged(peer: Peer, **options: Any) -> None:
    """Join, then do what the test says."""
    comm = peer.join(**options)
    peer.say("joined", rank=comm.rank)
    if not comm.founder:
        comm.sync({})
    while True:
        word = peer.hear("do")
        facts: dict[str, Any] = {}
        match word["what"]:
            case "leave":
                comm.leave()
                return
            case "optimize":
                facts = optimize(comm)
            case "die at":
                faults.arm(word["point"], dying(peer), word["kind"])
            case "admit":
                while not comm.admit():
                    time.sleep(0.005)
                comm.sync({})
            case "reduce":
                facts = reduce(comm)
        peer.say("done", **facts, members=comm.members)


def optimize(comm: Communicator) -> dict[str, Any]:
    """What was found."""
    found = comm.optimize(nbytes=2**16)
    measurement = found.measurement
    return {
        "ring": found.ring,
        "hosts": found.hosts,
        "measured": measurement.members,
        "latency": measurement.latency,
        "bandwidth": [[min(rate, 1e30) for rate in row] for row in measurement.bandwidth],
    }


def reduce(comm: Communicator) -> dict[str, Any]:
    """An all-reduce by a ring of whole numbers, which order does not change; to whom this member sent data."""
    tensor = torch.arange(4096, dtype=torch.float32) % 97 + 1000 * comm.member_id
    view = comm._runner.view("main")
    before = sent(comm)
    outcome = comm.all_reduce(tensor, algorithm="ring")
    to = [rank for rank, (now, then) in enumerate(zip(sent(comm), before, strict=False)) if now > then]
    want = (torch.arange(4096) % 97) * len(outcome.contributors) + 1000 * sum(outcome.contributors)
    return {
        "right": torch.equal(tensor, want.float()),
        "bits": bits(tensor),
        "order": view.order,
        "hosts": view.hosts,
        "to": [comm.members[rank] for rank in to],
        "contributors": outcome.contributors,
    }


def sent(comm: Communicator) -> list[int]:
    """Bytes of tensors that this member has sent to each rank in this epoch, where the transport counts."""
    assert comm._epochs is not None
    transport = comm._epochs.transport(comm.epoch)
    return list(transport.traffic.tensors_sent) if isinstance(transport, EmulatedTransport) else []
