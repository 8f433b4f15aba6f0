"""Programs of a run whose members change again and again, and what a process has of the system's resources."""

import gc
import time
from pathlib import Path

import torch

from collectives import faults
from tests.conformance.losses import BULK, dying
from tests.harness.peer import Peer

COUNT = BULK


def holdings(process: str = "self") -> dict[str, int]:
    """Threads, descriptors and KiB of anonymous memory of a process."""
    place = Path("/proc") / process
    rollup = (place / "smaps_rollup").read_text()
    memory = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return {
        "threads": len(list((place / "task").iterdir())),
        "descriptors": len(list((place / "fd").iterdir())),
        "memory": memory,
    }


def veteran(peer: Peer, rounds: int) -> list[dict[str, int]]:
    """Admit a newcomer, lose it in the middle of an all-reduce; and again. Returns the holdings after each round."""
    comm = peer.join()
    members = comm.members
    found = []
    for number in range(rounds):
        peer.say("round")
        while not comm.admit():
            time.sleep(0.002)
        tensor = torch.full((COUNT,), float(number * comm.member_id))
        outcome = comm.all_reduce(tensor)
        assert outcome.contributors == members == comm.members
        assert tensor.eq(number * sum(members)).all()
        del tensor, outcome
        gc.collect()
        found.append(settled())
    comm.leave()
    return found


def settled() -> dict[str, int]:
    """The holdings of this process when the last epoch's transport is gone, which takes a moment."""
    best = holdings()
    for _ in range(40):
        time.sleep(0.005)
        now = holdings()
        best = {key: min(best[key], now[key]) for key in best}
        if all(now[key] == best[key] for key in ("threads", "descriptors")):
            break
    return best


def newcomer(peer: Peer) -> None:
    """Join and die in the first operation, in the middle of a transfer."""
    comm = peer.join()
    faults.arm("transfer", dying(peer))
    comm.all_reduce(torch.ones(COUNT))
