"""What the members of a traced group do; see `test_trace`."""

import os
import signal

import torch

from collectives import faults
from tests.harness.peer import Peer


def operate(peer: Peer) -> int:
    with peer.join() as comm:
        comm.barrier()
        comm.all_reduce(torch.ones(100))
        comm.all_reduce(torch.ones(1_000_000), inplace=False)
        works = [comm.all_reduce(torch.ones(1000), lane=lane, async_op=True) for lane in ("left", "right")]
        for work in works:
            work.wait()
        comm.broadcast(torch.ones(300_000), comm.members[0])
        comm.barrier()
        return comm.member_id


def lose_one(peer: Peer, victim: bool) -> list[int]:
    comm = peer.join()
    comm.barrier()
    if victim:
        faults.arm("reduce", lambda where: os.kill(os.getpid(), signal.SIGKILL))
    outcome = comm.all_reduce(torch.ones(700_000))
    comm.leave()
    return list(outcome.contributors)


def profile(peer: Peer) -> list[str]:
    with peer.join() as comm, torch.profiler.profile() as profiler:
        comm.all_reduce(torch.ones(10))
        comm.barrier()
    return [event.key for event in profiler.key_averages() if event.key.startswith("ringhold::")]
