"""How transfers are cut follows from where the members are, alike on all."""

from contextlib import closing

import torch

from collectives.algorithms import ring
from collectives.engine import NOTE_BYTES, Engine
from collectives.instructions import TakeNote
from collectives.staging import StagingPool
from collectives.transports.mesh import LinkListener
from collectives.transports.site import Site
from collectives.transports.sockets import FAR_SEGMENT_BYTES, SocketTransport

COUNT = 2**19
"""Elements of a rank's chunk."""


def longest_note(hosts: list[str]) -> int:
    """Bytes of the longest note that rank 0 takes in an all-reduce of members on these hosts; nobody connects."""
    with closing(LinkListener()) as listener:
        addresses = [(host, listener.address[1] + rank) for rank, host in enumerate(hosts)]
        transport = SocketTransport(Site(listener, 0, addresses, b"key", 1, b"nonce"))
        program = Engine(StagingPool()).program(
            ring.all_reduce(len(hosts), len(hosts) * COUNT), transport, torch.float32, torch.float32
        )
        transport.close()
    notes = [made.into for made in program.instructions if isinstance(made, TakeNote)]
    return 4 * max(into.stop - into.start for into in notes)


def test_transfers_between_hosts_are_cut_finer() -> None:
    assert longest_note(["10.0.0.1"] * 3) == NOTE_BYTES
    assert longest_note(["10.0.0.1", "10.0.0.2", "10.0.0.1"]) == FAR_SEGMENT_BYTES
