"""Programs of honest members for the tests of strangers."""

import torch

from tests.harness.peer import Peer


def reduce_until_told(peer: Peer) -> dict[str, int]:
    """Reduce until all have been told to end; returns how many there were, and how many of others than all."""
    with peer.join() as comm:
        assert comm._epochs is not None
        peer.say("joined", rank=comm.rank, port=comm._epochs.address[1])
        count = odd = 0
        told = torch.zeros(1)
        while not told.item():
            told.fill_(float(_told(peer)))
            outcome = comm.all_reduce(told, op="min")
            count += 1
            odd += len(outcome.contributors) != comm.size or outcome.attempts != 1
            if count % 50 == 0:
                peer.say("count", count=count)
            comm.admit()
        return {"count": count, "odd": odd, "epoch": comm.epoch}


def _told(peer: Peer) -> bool:
    try:
        peer.hear("end", timeout=0.001)
    except TimeoutError:
        return False
    peer._heard.append({"word": "end"})  # and ever after
    return True
