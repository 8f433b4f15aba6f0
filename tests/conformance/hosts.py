"""Members on two hosts, as far as addresses tell: a loopback address each."""

import torch

from collectives import choice
from tests.conformance.operations.cases import check, contributions
from tests.conformance.values import reduced
from tests.harness.peer import Peer


def dwell(peer: Peer, address: str) -> list[str]:
    """Run what knows of hosts, and what is chosen, on a member of the host of that address."""
    with peer.join(listen=address) as comm:
        digests = []
        for number, (algorithm, count) in enumerate((a, n) for a in ("auto", "hierarchical") for n in (7, 400_003)):
            inputs = contributions(comm, [count], torch.float32, "sum", number)
            mine = inputs[comm.rank]
            outcome = comm.all_reduce(mine, inplace=False, algorithm=algorithm)
            digests.append(check(comm, outcome, reduced(inputs, "sum"), (algorithm, count)))
            outcome = comm.all_gather(mine, algorithm=algorithm)
            digests.append(check(comm, outcome, torch.stack(inputs), (algorithm, count)))
            root = comm.members[number % comm.size]
            if algorithm == "auto" or algorithm in choice.names("broadcast"):
                outcome = comm.broadcast(mine.clone(), root, algorithm=algorithm)
                digests.append(check(comm, outcome, inputs[number % comm.size], (algorithm, count)))
        comm.barrier()  # whoever leaves first changes how the last operation of the others ends
    return digests
