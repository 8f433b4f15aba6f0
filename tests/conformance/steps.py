"""Programs that train a little: steps of several buckets, and a state that must survive (rules R14 and R15)."""

import time
from typing import Any

import torch

from collectives import faults
from collectives.errors import MemberLost, StateLost
from tests.conformance.kinds import input_of
from tests.conformance.losses import dying, goes_on
from tests.harness.peer import Peer, bits

BUCKETS = 3
COUNT = 4000


def stepping(peer: Peer, bucket: int, point: str, on_loss: str, catch: bool, overlap: bool) -> dict[str, Any]:
    """Three steps; rank 1 dies at a point of a bucket (or, behind the last one, of the agreement) of the second.

    A step that does not count is repeated from where it began.
    """
    comm = peer.join()
    victim = comm.rank == 1
    weights = torch.zeros(BUCKETS, COUNT)
    history: list[tuple[int, ...]] = []
    while len(history) < 3:
        number = len(history)
        if victim and number == 1:
            faults.arm(point, dying(peer), skip=0 if point == "transfer" and bucket == 0 else bucket)
        gradients = torch.stack([input_of(comm.member_id, COUNT, 10 * number + b) for b in range(BUCKETS)])
        seen = []
        with comm.step() as step:
            try:
                if overlap:
                    works = [
                        comm.all_reduce(g, "avg", async_op=True, lane=f"l{b % 2}") for b, g in enumerate(gradients)
                    ]
                    seen = [work.wait().contributors for work in works]
                else:
                    seen = [comm.all_reduce(g, "avg", on_loss=on_loss).contributors for g in gradients]
            except MemberLost:
                if not catch:
                    raise
        peer.say("step", number=number, committed=step.committed, seen=seen)
        if step.committed:
            assert len(seen) == BUCKETS
            assert len(set(seen)) == 1, "buckets of one step were averaged over different members"
            weights -= gradients
            history.append(seen[0])
    assert goes_on(comm)
    comm.leave()
    return {"history": history, "weights": bits(weights)}


def raising(peer: Peer) -> str:
    """An error of the caller inside a step is the caller's, and nobody waits for an agreement."""
    comm = peer.join()
    said = ""
    try:
        with comm.step() as step:
            comm.all_reduce(torch.ones(1))
            raise ValueError("the batch is bad")
    except ValueError as error:
        said = str(error)
    assert not step.committed
    assert goes_on(comm)
    comm.leave()
    return said


def losing_state(peer: Peer) -> dict[str, Any]:
    """The only founder dies when it is to give its state; nobody of those that joined can."""
    comm = peer.join()
    if comm.founder:
        peer.say("founded")
        peer.hear("go")
        while not comm.admit():
            time.sleep(0.005)
        faults.arm("enter", dying(peer), kind="exchange")
    state = {"weights": torch.full((1000,), float(comm.member_id))}
    try:
        comm.sync(state)
    except StateLost as error:
        result = {"said": str(error), "intact": state["weights"].eq(comm.member_id).all().item()}
    comm.leave()
    return result


def surviving_state(peer: Peer, point: str) -> dict[str, Any]:
    """Two founders train, two come; one founder dies at a point of the transfer; all end with the other's state."""
    comm = peer.join()
    founder = comm.founder
    state = {"weights": torch.zeros(300_000), "step": 0}
    if founder:
        comm.sync(state)
        for number in range(3):
            gradient = input_of(comm.member_id, 300_000, number)
            comm.all_reduce(gradient, "avg")
            state["weights"] += gradient  # type: ignore[operator]
            state["step"] += 1  # type: ignore[operator]
        peer.say("trained", rank=comm.rank)
        peer.hear("go")
        while not comm.admit():
            time.sleep(0.005)
        if comm.rank == 0:
            faults.arm(point, dying(peer), kind="exchange", skip=1)
    report = comm.sync(state)
    assert goes_on(comm)
    comm.leave()
    return {"state": report.winner, "step": state["step"], "lost": report.lost, "voters": report.voters}


def apart(peer: Peer) -> list[bool]:
    """Rank 1 dies in an operation that rank 0 carries into its step and the others have behind them."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 1:
        faults.arm("begin", dying(peer))
    work = comm.all_reduce(torch.ones(COUNT), async_op=True)
    if comm.rank != 0:
        work.wait()
    story = []
    for _ in range(2):
        with comm.step() as step:
            work.wait()
            comm.all_reduce(torch.ones(COUNT))
        story.append(step.committed)
    comm.leave()
    return story
