"""What the members of a sync test do, each in a process of its own (see `sync_crew`), and what they tell the test."""

import dataclasses
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import RingholdError
from collectives.hashing import CHUNK_BYTES
from collectives.state import state_hash
from collectives.sync import SyncReport, sync
from tests.collectives.states import State, clone, training

CHUNK_FLOATS = CHUNK_BYTES // 4


@dataclass(frozen=True)
class Part:
    """Who a process is in its scenario."""

    number: int
    founders: int
    coordinator: str
    run: str
    token: str
    options: dict[str, Any]
    folder: Path

    @property
    def founder(self) -> bool:
        return self.number < self.founders

    def join(self) -> Communicator:
        comm = Communicator.join(self.coordinator, self.run, self.token, options=self.options)
        (self.folder / f"pid{comm.member_id}").write_text(str(os.getpid()))
        return comm


def told(report: SyncReport, state: State) -> dict[str, Any]:
    """A report as JSON can carry it, with the digest that the state really has."""
    return {**dataclasses.asdict(report), "digest": state_hash(state)}


def wait_for(comm: Communicator, size: int) -> None:
    """Go from safe point to safe point until the group has that size."""
    while comm.size != size:
        comm.admit()
        time.sleep(0.02)


def healing(part: Part) -> list[Any]:
    """A first sync of founders that began differently; then one goes astray in one chunk."""
    comm = part.join()
    state = {**training(seed=part.number), "w": torch.arange(4.0 * CHUNK_FLOATS) + part.number}
    first = told(comm.sync(state), state)
    equal = told(comm.sync(state), state)
    if comm.rank == 1:
        state["w"][2 * CHUNK_FLOATS] += 1
        state["optimizer"]["param_groups"][0]["lr"] = 7.0
    again = told(comm.sync(state), state)
    comm.leave()
    return [first, equal, again]


def survivor(part: Part) -> list[Any]:
    """Two founders train; one is killed; three newcomers of the founders' seed join and outnumber the other."""
    state = training(seed=0)
    if not part.founder:
        while not (part.folder / "alone").exists():
            time.sleep(0.02)
    comm = part.join()
    if part.founder:
        comm.sync(state)
        state.update(training(seed=0, steps=4))
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.barrier()
        (part.folder / "alone").touch()
        wait_for(comm, 4)
    else:
        wait_for(comm, 4)
    report = told(comm.sync(state), state)
    comm.leave()
    return [report, state_hash(training(seed=0, steps=4))]


def giver_dies(part: Part) -> list[Any]:
    """The taker kills the giver of a running transfer; another takes over with what has arrived."""
    comm = part.join()
    state: State = {"w": torch.arange(12 * CHUNK_FLOATS, dtype=torch.float32)}
    comm.sync(state)
    if comm.rank == 2:
        state["w"] += 1
        victim = int((part.folder / f"pid{comm.members[0]}").read_text())
        faults.arm("transfer", lambda _: os.kill(victim, signal.SIGKILL), kind="exchange", skip=7)
    report = told(sync(comm, state, True, True, round_bytes=4 * CHUNK_BYTES), state)
    comm.leave()
    return [report, state_hash({"w": torch.arange(12 * CHUNK_FLOATS, dtype=torch.float32)})]


def diverged(part: Part) -> list[Any]:
    """Two veterans and no majority: both are told the keys, and their states are as they were."""
    comm = part.join()
    state = training(seed=0)
    comm.sync(state)
    if comm.rank == 1:
        state["model"]["0.bias"] += 1
    before = state_hash(clone(state))
    try:
        comm.sync(state)
        return []
    except RingholdError as error:
        return [type(error).__name__, list(getattr(error, "keys", ())), before == state_hash(state)]
    finally:
        comm.leave()
