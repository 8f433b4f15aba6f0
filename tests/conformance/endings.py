"""Programs that end without leaving."""

import torch

from collectives import faults
from tests.conformance.losses import goes_on
from tests.harness.peer import Peer


def forgetful(peer: Peer, under_way: bool) -> None:
    """End as a script that forgets to leave does; rank 0 maybe with operations under way."""
    comm = peer.join()
    peer.finalize = True
    assert goes_on(comm)
    peer.say("rank", rank=comm.rank)
    if not under_way:
        return
    if comm.rank == 0:
        faults.arm("enter", lambda where: peer.say("entered"))
        comm.all_reduce(torch.ones(300_000), async_op=True, on_loss="raise")
        comm.all_reduce(torch.ones(300_000), async_op=True, lane="other")
        peer.hear("go")
        return
    peer.hear("go")
    outcome = comm.all_reduce(torch.ones(300_000), lane="other")
    assert len(outcome.contributors) == 2
