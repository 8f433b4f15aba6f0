"""A run over MPI that spawns ranks: the program of the first ones, and (`python -m`) of those that they spawn.

The script of the run, by member ids: 3 dies; 1 spawns 4 and 5; 5 dies in the middle of an all-reduce; 1 spawns 6, and 2
dies when it connects with it. What cannot be started is an error, and 1, 4 and 6 go on.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NoReturn
from unittest import mock

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import SpawnFailed
from collectives.transports import mpi_spawn
from tests.conformance.kinds import average, input_of
from tests.conformance.lanes import ask_for_error
from tests.conformance.losses import BULK, dying
from tests.harness.peer import PATIENCE, Peer

Die = Callable[[str], None]
_PR_SET_PDEATHSIG = 1


def founder(peer: Peer) -> list[object]:
    """One of three ranks that mpirun started."""
    comm, die = peer.join(), dying(peer)
    seen: list[object] = [_reduce(comm, 0, die, victim=3)]
    _spawn(comm, peer, 2)
    seen += early(comm, die)
    _spawn(comm, peer, 1, "late")
    with mock.patch.object(mpi_spawn, "meet", lambda *_: die("meet")) if comm.member_id == 2 else nullcontext():
        seen += late(comm, die)
    said = ask_for_error(lambda: comm.spawn(["/no/such/program"]), SpawnFailed)
    seen.append("/no/such/program" in said)
    seen.append(_reduce(comm, 4, die))
    comm.leave()
    return seen


def main() -> NoReturn:
    """A rank that was spawned."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    comm = Communicator.join(run=os.environ["RINGHOLD_RUN"], transport="mpi")

    def die(_: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        new = sys.argv[1:] != ["late"]
        if new:
            early(comm, die, new)
        late(comm, die, not new)
        _reduce(comm, 4, die)
        comm.leave()
    finally:
        sys.stderr.flush()
        os._exit(0)


def early(comm: Communicator, die: Die, new: bool = False) -> list[object]:
    """What all do from the first spawn on; returns the contributors of each all-reduce."""
    admit(comm, 5, new)
    return [_reduce(comm, 1, die), _reduce(comm, 2, die, victim=5)]


def late(comm: Communicator, die: Die, new: bool = False) -> list[object]:
    """What all do from the second spawn on."""
    admit(comm, 6, new)
    return [_reduce(comm, 3, die)]


def _spawn(comm: Communicator, peer: Peer, count: int, *arguments: str) -> None:
    """The first member does it."""
    if comm.member_id == 1:
        spawn(comm, peer, count, __name__, *arguments)


def spawn(comm: Communicator, peer: Peer, count: int, module: str, *arguments: str) -> None:
    """Spawn ranks that run a module, and join the run."""
    setting = peer.setting
    environ = {"RINGHOLD_COORDINATOR": setting["address"], "RINGHOLD_TOKEN": setting["token"], "OMP_NUM_THREADS": "1"}
    environ["RINGHOLD_RUN"] = setting["run"]
    comm.spawn([sys.executable, "-m", module, *arguments], count, environ)


def _reduce(comm: Communicator, number: int, die: Die, victim: int = 0) -> list[int]:
    """Contributors of an all-reduce, in the middle of which a member dies, after proof of its result."""
    if comm.member_id == victim:
        faults.arm("transfer", die)
    tensor = input_of(comm.member_id, BULK, number)
    outcome = comm.all_reduce(tensor, "avg", algorithm="ring")
    assert torch.equal(tensor, average(outcome.contributors, BULK, number))
    return list(outcome.contributors)


def admit(comm: Communicator, last: int, new: bool) -> None:
    """Stand at safe points until that member is here; they may come one at a time."""
    deadline, changed = time.monotonic() + PATIENCE, new
    while changed or max(comm.members) < last:
        assert time.monotonic() < deadline, f"members {comm.members} after {PATIENCE} s"
        if changed:
            comm.sync({})
        changed = max(comm.members) < last and comm.admit()
        time.sleep(0.005)


if __name__ == "__main__":
    main()
