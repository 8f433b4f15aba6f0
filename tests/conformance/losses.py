"""Programs whose members die by SIGKILL at chosen points of operations, and what the survivors saw of it."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from collectives import faults
from collectives.communicator import Communicator
from collectives.confirm import confirm
from collectives.errors import Evicted, MemberLost, TransportLost
from collectives.outcome import Outcome
from collectives.transports.base import Transport
from tests.conformance.kinds import KINDS, End, average, input_of, result_of
from tests.harness.peer import Peer, bits

SMALL = 600
BULK = 1_100_004
"""Elements of single precision whose quarter is more than a transport sends as a note; divisible by 12."""
ROW = 300_000
"""The same where the whole is sent."""


def dying(peer: Peer) -> Callable[[str], None]:
    """The action of a fault: say so, then die without another word."""

    def die(where: str) -> None:
        peer.say("fired", where=where)
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def witness(comm: Communicator, kind: str, size: str, number: int, root: int, **how: Any) -> dict[str, Any]:
    """Run one operation and tell all about its end."""
    this, members = KINDS[kind], comm.members
    count = SMALL if size == "small" else ROW if this.whole else BULK
    tensor = input_of(comm.member_id, count, number)
    before = tensor.clone()
    report: dict[str, Any] = {"before": members, "member": comm.member_id}
    try:
        outcome = this.call(comm, tensor, members[root], **how)
    except MemberLost as error:
        report |= {"error": str(error), "lost": error.lost, "survivors": error.survivors}
        report |= {"intact": torch.equal(tensor, before)}
    else:
        who = outcome.contributors
        want, result = this.expect(End(who, count, number, comm.member_id, members[root])), result_of(outcome)
        report |= {"contributors": who, "epoch": outcome.epoch, "from_staging": outcome.from_staging}
        report |= {"right": result is None if want is None else result is not None and torch.equal(result, want)}
        # The bits of a share say nothing to the others.
        report |= {"bits": "" if want is None or this.alone else bits(want)}
        report |= {"intact": this.in_place or torch.equal(tensor, before)}
    return report | {"after": comm.members, "rank": comm.rank}


def _result(outcome: Outcome) -> Tensor:
    assert outcome.result is not None
    return outcome.result


def goes_on(comm: Communicator) -> bool:
    """Whether the group works, to the bit, among those that it says are here."""
    total = comm.all_reduce(torch.tensor([comm.member_id]))
    return bool(_result(total).item() == sum(comm.members)) and total.contributors == comm.members


def mortal(peer: Peer, kind: str, points: list[str], size: str, victims: list[int]) -> None:
    """Rounds of one operation; in each, the member of that rank dies at that point of it."""
    comm = peer.join()
    for number, (victim, point) in enumerate(zip(victims, points, strict=True)):
        assert goes_on(comm)
        if comm.rank == victim:
            several = kind == "all_reduce_coalesced"  # three operations: it dies in another one each time
            faults.arm(point, dying(peer), kind=kind.split(maxsplit=1)[0], skip=number if several else 0)
        root = victim if kind.endswith("the victim") else (victim + 1) % comm.size
        # In some algorithms some ranks reduce nothing.
        algorithm = KINDS[kind].algorithm if point == "reduce" else "auto"
        peer.say("report", **witness(comm, kind, size, number, root, algorithm=algorithm))
        assert goes_on(comm)
    comm.leave()


def cascade(peer: Peer, event: str) -> dict[str, Any]:
    """Rank 1 dies in an operation, rank 3 while the membership changes for that; the others go on."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 1:
        faults.arm("transfer", dying(peer))
    if comm.rank == 3:
        die = dying(peer)
        comm.on_event(lambda one: die(one["event"]) if one["event"] == event else None)
    report = witness(comm, "all_reduce", "bulk", 2, 0)
    assert goes_on(comm)
    comm.leave()
    return report


def only_finisher(peer: Peer, kind: str, point: str) -> dict[str, Any]:
    """Rank 1 dies right after it alone has learned that everybody staged; the others' confirmations never arrive."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 1:
        faults.arm(point, dying(peer), kind=kind.split(maxsplit=1)[0])
        return witness(comm, kind, "bulk", 2, 0)

    def confirm_in_vain(transport: Transport, channel: int, token: bytes) -> None:
        confirm(transport, channel, token)
        raise TransportLost("the last note was lost")

    with mock.patch("collectives.group.confirm", confirm_in_vain):
        report = witness(comm, kind, "bulk", 2, 0)
    assert goes_on(comm)
    comm.leave()
    return report


def half_way(peer: Peer) -> dict[str, Any]:
    """Rank 1 is interrupted between the two operations of a call: it has departed, and the others go on without it."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 1:
        interrupted = mock.patch("collectives.operations.uneven.GatherRows", side_effect=KeyboardInterrupt)
        with interrupted, suppress(KeyboardInterrupt):
            comm.all_gather_v(torch.ones(3))
        try:
            comm.barrier()
        except Evicted as error:
            return {"error": str(error)}
    report = witness(comm, "all_gather_v", "small", 2, 0)
    assert goes_on(comm)
    comm.leave()
    return report


def many_lanes(peer: Peer, skip: int) -> list[list[int]]:
    """Rank 1 dies while five lanes have three operations each under way; who contributed to each of them."""
    comm = peer.join()
    assert goes_on(comm)
    if comm.rank == 1:
        faults.arm("transfer", dying(peer), skip=skip)
    keys = [(lane, turn) for turn in range(3) for lane in range(5)]
    tensors = {key: input_of(comm.member_id, 30_000, number) for number, key in enumerate(keys)}
    works = {key: comm.all_reduce(tensor, "avg", lane=f"l{key[0]}", async_op=True) for key, tensor in tensors.items()}
    seen = []
    for number, (key, work) in enumerate(works.items()):
        who = work.wait().contributors
        assert torch.equal(tensors[key], average(who, 30_000, number))
        seen.append(list(who))
    assert goes_on(comm)
    comm.leave()
    return seen
