"""What the members do in `test_r10_memory`: operations on memory that peers map, and on such that they may not read."""

import os
from typing import Any
from unittest import mock

import torch

from collectives.arena import SMALLEST_EXCHANGE, process_arena
from collectives.communicator import Communicator
from collectives.transports.remote import RemoteMemory
from tests.conformance.values import exact, reduced
from tests.harness.peer import Peer, bits

PAGE = 4096
SIZES = (1, 1000, 300_000, 1_500_007)


def registered(comm: Communicator, mapped: bool) -> list[str]:
    """All-reduces in registered memory, next to some in ordinary memory; digests of the results."""
    digests = []
    for number, count in enumerate(SIZES):
        inputs = [exact(rank, [count], torch.float32, "sum", number) for rank in range(comm.size)]
        for algorithm in ("ring", "direct", "doubling"):
            tensor = comm.empty(count)
            if comm.rank == 0 and algorithm == "direct":
                tensor = torch.empty(count)
            else:
                assert (process_arena().offset(tensor) is not None) == mapped
            tensor.copy_(inputs[comm.rank])
            out = comm.all_reduce(tensor, inplace=False, algorithm=algorithm).result
            assert torch.equal(tensor, inputs[comm.rank])
            before = process_arena().offset(tensor[:PAGE]) if mapped else None
            comm.all_reduce(tensor, algorithm=algorithm)
            assert out is not None
            assert torch.equal(out, reduced(inputs, "sum"))
            assert torch.equal(out, tensor)
            if before is not None and tensor.nbytes > SMALLEST_EXCHANGE:
                assert process_arena().offset(tensor[:PAGE]) != before, "the result was copied"
            # Once more, where the pages lie now.
            comm.all_reduce(tensor, "max", algorithm=algorithm)
            assert torch.equal(out, tensor)
            digests.append(bits(tensor))
    return digests


def unreadable(peer: Peer, blind: list[int]) -> dict[str, Any]:
    """Those of these numbers may not read other processes' memory, as in a container without that permission."""
    original = RemoteMemory.may_read
    number = int(peer.name.rsplit("-", 1)[1])

    def may_read(memory: RemoteMemory) -> bool:
        return original(memory) and number not in blind

    with mock.patch.object(RemoteMemory, "may_read", may_read):
        comm = peer.join()
    held = []
    for _ in range(3):
        digests = registered(comm, mapped=True)
        gathered = comm.all_gather(torch.full((50_000,), comm.rank)).result
        assert gathered is not None
        assert torch.equal(gathered, torch.arange(comm.size)[:, None].expand(-1, 50_000))
        comm.barrier()
        comm.barrier()  # its notes come behind the acknowledgements
        held.append(os.fstat(process_arena().descriptor).st_blocks * 512)
    comm.leave()
    return {"digests": digests, "grown": held[2] - held[1]}
