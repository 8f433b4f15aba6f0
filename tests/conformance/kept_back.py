"""Messages that MPI keeps back at their sender: the program of a rank, and (`python -m`) of the one that it spawns.

The two talk over TCP. The founder sends more than a connection holds, in messages that are over for the library as soon
as it has copied them, and then waits for a note, with no transfer of its own under way.
"""

import os
from typing import NoReturn

import torch

from collectives.communicator import Communicator
from collectives.transports.mesh import LinkListener
from collectives.transports.mpi import MpiTransport
from collectives.transports.site import Site
from tests.conformance.spawned import admit, spawn
from tests.harness.peer import PATIENCE, Peer

CHANNEL = 7
MESSAGES, SIZE = 600, 60_000
"""36 MB: more than two sockets hold; each of fewer bytes than the library's limit for what it copies."""


def founder(peer: Peer) -> str:
    """The only rank that mpirun starts."""
    with peer.join() as comm:
        spawn(comm, peer, 1, __name__)
        admit(comm, 2, new=False)
        transport = _transport(comm)
        sends = [transport.send(1, _message(number), CHANNEL) for number in range(MESSAGES)]
        for send in sends:
            send.wait()
        transport.send_note(1, b"sent", CHANNEL)
        said = transport.recv_note(1, CHANNEL, PATIENCE).decode()
        comm.barrier()
        transport.close()
    return said


def main() -> NoReturn:
    """The rank that is spawned."""
    comm = Communicator.join(run=os.environ["RINGHOLD_RUN"], transport="mpi")
    admit(comm, 2, new=True)
    transport = _transport(comm)
    assert transport.recv_note(0, CHANNEL, PATIENCE) == b"sent"
    for number in range(MESSAGES):
        into = torch.zeros(SIZE, dtype=torch.uint8)
        transport.recv(0, into, CHANNEL).wait()
        assert torch.equal(into, _message(number))
    transport.send_note(0, b"all came", CHANNEL)
    comm.barrier()
    os._exit(0)


def _message(number: int) -> torch.Tensor:
    return torch.full((SIZE,), number % 251, dtype=torch.uint8)


def _transport(comm: Communicator) -> MpiTransport:
    listener = LinkListener()
    ports = comm.all_gather(torch.tensor(listener.address[1])).result
    assert ports is not None
    addresses = [("127.0.0.1", int(port)) for port in ports]
    transport = MpiTransport(Site(listener, comm.rank, addresses, b"key", 1, b"nonce"))
    transport.connect(PATIENCE)
    return transport


if __name__ == "__main__":
    main()
