"""Programs of ranks of MPI jobs, for `test_mpi`."""

import time
from typing import Any
from unittest import mock

import torch

from collectives import faults
from collectives.errors import TransportLost, Unsupported
from collectives.transports import mpi_world
from collectives.transports.mesh import LinkListener
from collectives.transports.mpi import MpiTransport
from collectives.transports.site import Site
from tests.conformance.kinds import average, input_of
from tests.conformance.lanes import ask_for_error
from tests.conformance.losses import dying, goes_on
from tests.harness.peer import PATIENCE, Peer

CHANNEL = 7


def settle(peer: Peer, rounds: int) -> dict[str, Any]:
    """In each round the last rank dies with bulk under way; what that left in MPI must get out of it by and by."""
    comm = peer.join()
    seen, count = [], 3_000_000
    for number in range(rounds):
        assert goes_on(comm)
        if comm.rank == comm.size - 1:
            faults.arm("transfer", dying(peer))
        tensor = input_of(comm.member_id, count, number)
        outcome = comm.all_reduce(tensor, "avg", algorithm="ring")
        assert torch.equal(tensor, average(outcome.contributors, count, number))
        seen.append(list(outcome.contributors))
    leftovers, deadline = mpi_world.enter().leftovers, time.monotonic() + PATIENCE
    while leftovers.sweep() and time.monotonic() < deadline:
        assert goes_on(comm)
    comm.barrier()
    comm.leave()
    return {"seen": seen, "left": leftovers.sweep()}


def abandon(peer: Peer) -> dict[str, Any]:
    """Two epochs of raw transports: sends of the first that nobody received are not taken in the second, and end."""
    comm = peer.join()
    world = mpi_world.enter()
    listener = LinkListener()
    ports = comm.all_gather(torch.tensor(listener.address[1])).result
    assert ports is not None
    addresses = [("127.0.0.1", int(port)) for port in ports]
    other = 1 - comm.rank
    first = MpiTransport(Site(listener, comm.rank, addresses, b"key", 1, b"nonce"))
    first.connect(PATIENCE)
    for value in (1, 2, 3):
        first.send(other, torch.full((1_000_000,), value, dtype=torch.int32), CHANNEL)
    into = torch.zeros(1_000_000, dtype=torch.int32)
    first.recv(other, into, CHANNEL).wait()
    unmet = first.recv(other, torch.zeros(1_000_000, dtype=torch.int32), CHANNEL + 1)
    comm.barrier()
    first.abort()
    said = ask_for_error(unmet.wait, TransportLost)
    held = world.leftovers.sweep()
    comm.barrier()
    first.close()
    second = MpiTransport(Site(listener, comm.rank, addresses, b"key", 2, b"nonce"))
    second.connect(PATIENCE)
    sending = second.send(other, torch.full((1_000_000,), 9, dtype=torch.int32), CHANNEL)
    again = torch.zeros(1_000_000, dtype=torch.int32)
    second.recv(other, again, CHANNEL).wait()
    sending.wait()
    deadline = time.monotonic() + PATIENCE
    while world.leftovers.sweep() and time.monotonic() < deadline:
        time.sleep(0.001)
    left = world.leftovers.sweep()
    comm.barrier()
    second.close()
    listener.close()
    comm.leave()
    return {"said": said, "held": held, "left": left, "got": [sorted(set(one.tolist())) for one in (into, again)]}


def large(peer: Peer) -> list[int]:
    """Messages of more bytes than what one MPI message may hold, where that is little."""
    tensor = torch.arange(200_000)
    with mock.patch("collectives.transports.mpi.MOST_BYTES", 1000), peer.join() as comm:
        comm.all_reduce(tensor, algorithm="ring")
        return [comm.size, int(tensor[-1])]


def hosts(peer: Peer) -> dict[str, Any]:
    """A member that lets in who waits, until it has lost somebody again; and goes on."""
    comm = peer.join()
    peer.say("joined")
    while not any(event["event"] == "epoch" and event["lost"] for event in peer.events):
        comm.admit()
        assert goes_on(comm)
        time.sleep(0.01)
    assert goes_on(comm)
    size = comm.size
    comm.leave()
    return {"size": size}


def stranger(peer: Peer) -> str:
    """A process that no mpirun started."""
    return ask_for_error(peer.join, Unsupported)
