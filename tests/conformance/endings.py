"""Programs that end without leaving."""

import threading
import time

import torch

from collectives import faults
from tests.conformance.losses import goes_on
from tests.harness.peer import Peer


def forgetful(peer: Peer, under_way: bool) -> None:
    """End as a script that forgets to leave does: rank 0 maybe in the middle of a transfer, the others right after."""
    comm = peer.join()
    peer.finalize = True
    assert goes_on(comm)
    if not under_way:
        return
    moving = threading.Event()

    def pause(where: str) -> None:
        moving.set()
        time.sleep(0.2)

    if comm.rank == 0:
        faults.arm("transfer", pause)
        comm.all_reduce(torch.ones(900_000), async_op=True, algorithm="ring")
        comm.all_reduce(torch.ones(900_000), async_op=True, lane="other")
        assert moving.wait(60)
        return
    tensor = torch.ones(900_000)
    assert comm.all_reduce(tensor, algorithm="ring").contributors == comm.members
    assert tensor.eq(comm.size).all()
