"""Programs about lanes, waits, interrupts and what a caller sees of the membership (rules R1, R4, R5)."""

import threading
import time
from typing import Any
from unittest import mock

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import CrossedWaits, Evicted, LaneMisuse, MemberLost, OperationTimeout, UsageError
from collectives.outcome import Outcome
from tests.conformance.losses import BULK, dying, goes_on
from tests.harness.peer import Peer


def ask_for_error(call: Any, *kinds: type[Exception]) -> str:
    """What the error of a call says; the call must raise one of these."""
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError(f"{kinds} was not raised")


def total_of(outcome: Outcome) -> int:
    """The one number of a result."""
    assert outcome.result is not None
    return int(outcome.result.sum().item())


def misuse_lane(comm: Communicator) -> str:
    """Use a lane from two threads at once, and admit while it is in use."""
    entered = threading.Event()
    if comm.rank == 0:
        faults.arm("enter", lambda _: entered.set())
        thread = threading.Thread(target=lambda: comm.all_reduce(torch.ones(1), lane="x"))
        thread.start()
        assert entered.wait(60)
        said = ask_for_error(lambda: comm.all_reduce(torch.ones(1), lane="x"), LaneMisuse)
        said += ask_for_error(comm.admit, LaneMisuse)
        comm.barrier()
        thread.join()
        # Idle now, so anybody may use it.
        comm.all_reduce(torch.ones(1), lane="x")
        return said
    comm.barrier()
    for _ in range(2):
        comm.all_reduce(torch.ones(1), lane="x")
    return ""


def wait_briefly(comm: Communicator) -> list[float]:
    """A wait that times out, twice, and then does not."""
    tensor = torch.full((3,), comm.rank + 1.0)
    if comm.rank == 0:
        work = comm.all_reduce(tensor, async_op=True)
        for _ in range(2):
            said = ask_for_error(lambda: work.wait(0.02), OperationTimeout)
            assert "wait again" in said
            assert not work.is_completed()
        assert tensor.tolist() == [1.0] * 3
        comm.barrier(lane="gate")
        work.wait()
        assert work.wait() == work.wait(0)
    else:
        comm.barrier(lane="gate")
        comm.all_reduce(tensor)
    return tensor.tolist()


def interrupted(peer: Peer, point: str) -> dict[str, Any]:
    """The highest rank is interrupted in operation 2, joins again, and is admitted."""
    comm = peer.join()
    assert goes_on(comm)
    peer.say("rank", rank=comm.rank)
    if comm.rank == comm.size - 1:

        def interrupt(where: str) -> None:
            peer.say("fired", where=where)
            if point != "signal":
                raise KeyboardInterrupt

        faults.arm("enter" if point == "signal" else point, interrupt)
        try:
            comm.all_reduce(torch.ones(BULK), algorithm="ring")
            raise AssertionError("it was not interrupted")
        except KeyboardInterrupt:
            said = ask_for_error(lambda: goes_on(comm), Evicted)
        comm.close()
        comm = peer.join()
        comm.sync({})
        assert goes_on(comm)
        result = {"said": said, "member": comm.member_id}
    else:
        if point == "signal":
            peer.hear("go")
        tensor = torch.ones(BULK)
        outcome = comm.all_reduce(tensor, algorithm="ring")
        while not comm.admit():
            time.sleep(0.005)
        comm.sync({})
        assert goes_on(comm)
        result = {"contributors": outcome.contributors, "right": tensor.eq(len(outcome.contributors)).all().item()}
    comm.leave()
    return result


def halted(peer: Peer, point: str) -> dict[str, Any]:
    """With on_loss="raise" and a death at a point of operation 2: what becomes of 2, 3, 4, and of 5 after resume."""
    comm = peer.join()
    members = comm.members
    assert goes_on(comm)
    if comm.rank == 1:
        faults.arm(point, dying(peer))
    story = []
    for number in (2, 3, 4):
        tensor = torch.full((50_000,), number)
        try:
            outcome = comm.all_reduce(tensor, on_loss="raise")
            story.append(f"{total_of(outcome) // 50_000 // number} contributors")
        except MemberLost as error:
            assert error.lost == (members[1],)
            assert error.survivors == tuple(m for m in members if m != members[1])
            assert tensor.eq(number).all()
            story.append("call resume() first" if "call resume() first" in str(error) else "lost")
    comm.resume()
    assert goes_on(comm)
    comm.leave()
    return {"story": story, "members": comm.members}


def queued(peer: Peer, on_loss: str, kind: str) -> dict[str, Any]:
    """Ranks 0 and 1 have queued three operations before the loss, rank 2 issues one after the other, rank 3 dies."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 3:
        faults.arm("transfer", dying(peer), kind=kind)
    how: dict[str, Any] = {"on_loss": on_loss, "inplace": False} if kind == "all_reduce" else {"on_loss": on_loss}
    story = []

    def note(call: Any) -> None:
        try:
            outcome = call()
            story.append(f"{len(outcome.contributors)} contributors")
        except MemberLost:
            story.append("lost")

    tensors = [torch.full((12, 20), number) for number in range(3)]
    start = comm.all_reduce if kind == "all_reduce" else comm.reduce_scatter
    if comm.rank < 2:
        works = [start(tensor, async_op=True, **how) for tensor in tensors]
        for work in works[:-1] if on_loss == "raise" else works:
            note(work.wait)
        if on_loss == "raise":
            comm.resume()  # with one in the queue still, or just out of it
            note(works[-1].wait)
    else:
        for tensor in tensors:
            note(lambda tensor=tensor: start(tensor, **how))
    comm.resume()
    assert goes_on(comm)
    comm.leave()
    return {"story": story}


def view(peer: Peer) -> list[list[int]]:
    """What rank 0 sees while an operation that outlives a member is under way, then done, then waited for."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 2:
        faults.arm("begin", dying(peer))
    work = comm.all_reduce(torch.ones(5), async_op=True)
    peer.await_event("recovered")
    while comm.rank == 0 and not work.is_completed():
        time.sleep(0.001)
    seen = [list(comm.members)]
    outcome = work.wait()
    seen.append(list(comm.members))
    assert comm.members == outcome.contributors
    assert comm.size == 2
    assert comm.epoch == outcome.epoch
    comm.leave()
    return seen


def crossed(comm: Communicator) -> list[str]:
    """Wait for each other in two lanes; then what the second operation of each lane says."""
    lanes = ["a", "b"] if comm.rank == 0 else ["b", "a"]
    said = [ask_for_error(lambda lane=lane: comm.barrier(lane=lane), CrossedWaits) for lane in lanes]
    assert goes_on(comm)
    for lane in lanes:
        comm.barrier(lane=lane, async_op=True)
    comm.barrier()
    return said


def same_channel(comm: Communicator) -> str:
    """Ask for two lanes whose channels collide; no two names are known that do."""
    with mock.patch("collectives.group.channel_of", lambda lane: 7):
        comm.barrier(lane="one")
        return ask_for_error(lambda: comm.barrier(lane="two"), UsageError)
