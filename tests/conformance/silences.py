"""Programs whose members fall silent without dying: stopped, absent, or cut off on one link (rule R11)."""

import os
import socket
import time
from typing import Any
from unittest import mock

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.epochs import TRANSPORTS
from collectives.errors import Evicted, TransportLost
from tests.conformance.kinds import average, input_of
from tests.conformance.lanes import ask_for_error
from tests.conformance.losses import BULK, goes_on
from tests.harness.peer import Peer


def reduce_rightly(comm: Communicator, number: int, count: int = 100_000, lane: str = "main") -> list[int]:
    """An all-reduce in place of exact values; checks every bit and returns the contributors."""
    tensor = input_of(comm.member_id, count, number)
    outcome = comm.all_reduce(tensor, "avg", algorithm="ring", lane=lane)
    assert torch.equal(tensor, average(outcome.contributors, count, number))
    return list(outcome.contributors)


def stopped(peer: Peer, point: str) -> dict[str, Any]:
    """Rank 1 is stopped at a point of operation 2, learns on waking that it was evicted, and joins again."""
    comm = peer.join()
    assert goes_on(comm)
    peer.say("rank", rank=comm.rank)
    if comm.rank == 1:

        def pause(where: str) -> None:
            peer.say("here", where=where)
            peer.hear("woken")

        faults.arm(point, pause)
        said = ask_for_error(lambda: [reduce_rightly(comm, number, BULK) for number in range(2, 9)], Evicted)
        comm.close()
        comm = peer.join()
        comm.sync({})
        assert goes_on(comm)
        comm.leave()
        return {"said": said, "rejoined": comm.member_id}
    seen = [reduce_rightly(comm, number, BULK) for number in range(2, 9)]
    peer.say("done")
    while not comm.admit():
        time.sleep(0.01)
    comm.sync({})
    assert goes_on(comm)
    comm.leave()
    return {"seen": seen}


def absent(peer: Peer) -> dict[str, Any]:
    """Rank 2 beats but does not come to operation 2."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 2:
        peer.await_event("evicted")
        return {"said": ask_for_error(lambda: comm.barrier(), Evicted)}
    seen = reduce_rightly(comm, 2)
    assert goes_on(comm)
    comm.leave()
    return {"seen": seen}


def cut_link(comm: Communicator, rank: int) -> int:
    """Shut this member's connections to a lower rank down behind everybody's back; returns how many those were."""
    assert comm._session is not None
    decision = comm._session.core.decision
    assert decision is not None
    port = str(decision.members[rank].port)
    cut = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - what it lists are no files of ours
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket
        with sock:
            try:
                there = sock.getpeername()
            except OSError:
                continue  # one that listens
            if port in (str(there[1]) if isinstance(there, tuple) else os.fsdecode(there)):
                sock.shutdown(socket.SHUT_RDWR)
                cut += 1
    return cut


def cut(peer: Peer, times: int) -> dict[str, Any]:
    """The link between ranks 2 and 0 fails in the middle of operations 2 and maybe 3; both ends beat all the while."""
    comm = peer.join()
    assert goes_on(comm)
    rank, seen = comm.rank, []
    for number in range(2, 4):
        if rank == 2 and number < 2 + times:
            faults.arm("begin", lambda where: peer.say("cut", links=cut_link(comm, 0)))
        try:
            seen.append(reduce_rightly(comm, number))
        except Evicted as error:
            return {"rank": rank, "seen": seen, "said": str(error)}
    assert goes_on(comm)
    comm.leave()
    return {"rank": rank, "seen": seen, "epochs": [e["lost"] for e in peer.events if e["event"] == "epoch"]}


def slow(peer: Peer) -> list[int]:
    """Rank 0 comes late to an operation, but not too late."""
    comm = peer.join()
    if comm.rank == 0:
        time.sleep(0.5)
    seen = reduce_rightly(comm, 1)
    comm.leave()
    return seen


def unbuilt(peer: Peer, failure: str) -> dict[str, Any]:
    """On rank 1 the first transport after a loss cannot be built, for a reason that names no peer."""
    comm = peer.join()
    rank = comm.rank
    kind = TRANSPORTS[peer.setting["transport"]]
    original = kind.connect
    failures = [OSError(24, "Too many open files") if failure == "system" else TransportLost("gloo could not connect")]

    def connect(transport: Any, timeout: float) -> None:
        original(transport, timeout)
        if failures and rank == 1:
            raise failures.pop()

    with mock.patch.object(kind, "connect", connect):
        assert goes_on(comm)
        if rank == 2:
            comm.leave()
            return {}
        while len(seen := reduce_rightly(comm, 2)) == 3:
            time.sleep(0.01)
        assert goes_on(comm)
    comm.leave()
    return {"seen": seen, "fired": not failures, "epochs": [e["lost"] for e in peer.events if e["event"] == "epoch"]}
