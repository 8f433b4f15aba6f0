"""Programs of peers that join with the options of their cluster, whatever these are."""

import torch

from tests.harness.peer import Peer


def contributors(peer: Peer) -> int:
    """Join, reduce once, leave."""
    with peer.join() as comm:
        return len(comm.all_reduce(torch.ones(3)).contributors)
