"""Programs that send and receive: in rings, in crowds, with partners and outsiders that die, and by mistake."""

import threading
import time
from typing import Any

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import DescriptorMismatch, MemberLost, UsageError
from tests.conformance.kinds import input_of
from tests.conformance.lanes import ask_for_error
from tests.conformance.losses import BULK, SMALL, dying, goes_on
from tests.harness.peer import Peer


def around(comm: Communicator, size: str) -> bool:
    """Pass a tensor around the ring, in the other direction at the same time, and in both orders of the calls."""
    count = SMALL if size == "small" else BULK
    ids, rank = comm.members, comm.rank
    before, behind = ids[rank - 1], ids[(rank + 1) % comm.size]
    right = True
    for turn in range(3):
        mine, first, second = input_of(comm.member_id, count, turn), torch.zeros(count), torch.zeros(count)
        works = [comm.send(mine, behind, async_op=True), comm.recv(first, before, async_op=True)]
        works += [comm.recv(second, behind, tag=1, async_op=True), comm.send(mine, before, tag=1, async_op=True)]
        outcomes = [work.wait() for work in works]
        right &= torch.equal(first, input_of(before, count, turn)) and torch.equal(
            second, input_of(behind, count, turn)
        )
        right &= outcomes[1].contributors == (before, comm.member_id)
    if rank < 2:
        tensor = torch.tensor([rank, 2], dtype=torch.int64)
        outcome = comm.send(tensor, ids[1]) if rank == 0 else comm.recv(tensor, ids[0])
        right &= outcome.result is tensor and tensor.tolist() == [0, 2]
    return right


def in_order(comm: Communicator) -> list[int]:
    """Messages of a tag arrive in the order of the calls, those of another tag when they are wanted."""
    seen = torch.zeros(12, dtype=torch.int64)
    if comm.rank == 0:
        numbers = [torch.tensor([number]) for number in range(12)]
        works = [comm.send(numbers[n], comm.members[1], tag=n % 2, async_op=True) for n in range(12)]
        for work in works:
            work.wait()
    elif comm.rank == 1:
        for tag in (1, 0):
            for n in range(6):
                comm.recv(seen[6 * tag + n : 6 * tag + n + 1], comm.members[0], tag=tag)
    comm.barrier()
    return seen.tolist()


def crowd(comm: Communicator, messages: int) -> dict[str, int]:
    """Everybody sends many messages to everybody at once, in four tags; how many threads that takes and leaves."""
    others = [member for member in comm.members if member != comm.member_id]
    before = threading.active_count()
    given = torch.tensor([comm.member_id])
    boxes = {(m, n): torch.zeros(1, dtype=torch.int64) for m in others for n in range(messages)}
    works = [comm.recv(box, m, tag=n % 4, async_op=True) for (m, n), box in boxes.items()]
    works += [comm.send(given, m, tag=n % 4, async_op=True) for m in others for n in range(messages)]
    most = threading.active_count() - before
    for work in works:
        work.wait()
    wrong = sum(int(box.item() != member) for (member, _), box in boxes.items())
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"wrong": wrong, "most": most, "left": threading.active_count() - before}


def differing(comm: Communicator, shapes: list[list[int]], dtypes: list[str]) -> str:
    """A sender and a receiver that disagree; both are told so, and go on."""
    said = ""
    if comm.rank < 2:
        tensor = torch.ones(shapes[comm.rank], dtype=getattr(torch, dtypes[comm.rank]))
        partner = comm.members[1 - comm.rank]
        call = comm.send if comm.rank == 0 else comm.recv
        said = ask_for_error(lambda: call(tensor, partner), DescriptorMismatch)
        assert tensor.eq(1).all()
        good = torch.full((3,), float(comm.rank))
        (comm.send if comm.rank == 0 else comm.recv)(good, partner)
        assert good.eq(0).all()
    assert goes_on(comm)
    return said


def refused(comm: Communicator) -> list[str]:
    """Messages that cannot be."""
    tensor = torch.ones(1)
    return [
        ask_for_error(lambda: comm.send(tensor, comm.member_id), UsageError),
        ask_for_error(lambda: comm.recv(tensor, 77), UsageError),
        ask_for_error(lambda: comm.send(tensor, comm.members[1 - comm.rank], tag=-1), UsageError),
    ]


def partner_dies(peer: Peer, victim: int, point: str, size: str) -> dict[str, Any]:
    """Rank 0 sends to rank 1 and one of them dies at a point of it; rank 2 exchanges messages with rank 3 meanwhile."""
    comm = peer.join()
    ids, rank, count = comm.members, comm.rank, SMALL if size == "small" else BULK
    if rank == victim:
        faults.arm(point, dying(peer), kind="send_recv")
    partner = ids[rank ^ 1]
    tensor = input_of(comm.member_id, count, 0)
    report: dict[str, Any] = {"rank": rank}
    try:
        outcome = comm.send(tensor, partner) if rank % 2 == 0 else comm.recv(tensor, partner)
    except MemberLost as error:
        report |= {"lost": error.lost, "intact": torch.equal(tensor, input_of(comm.member_id, count, 0))}
        for _ in range(2):
            # It stays so, whichever way and tag.
            assert ask_for_error(lambda: comm.send(tensor, partner), MemberLost)
            assert ask_for_error(lambda: comm.recv(tensor, partner, tag=5, async_op=True).wait(), MemberLost)
    else:
        source = ids[rank & ~1]
        report |= {"right": torch.equal(tensor, input_of(source, count, 0)), "staged": outcome.from_staging}
    assert goes_on(comm)
    comm.leave()
    return report


def outsider_dies(peer: Peer, point: str, sizes: list[str]) -> None:
    """Ranks 0 and 1 hold still in a message while an outsider is killed; once for each size."""
    comm = peer.join()
    peer.say("rank", rank=comm.rank)
    if comm.rank > 1:
        peer.hear("nothing: it is killed")
    for number, size in enumerate(sizes):
        count = SMALL if size == "small" else BULK
        if comm.rank == number % 2:

            def hold(where: str) -> None:
                peer.say("reached", where=where)
                peer.hear("killed")

            faults.arm(point, hold, kind="send_recv")
        tensor = input_of(comm.rank, count, number)
        outcome = comm.send(tensor, comm.members[1]) if comm.rank == 0 else comm.recv(tensor, comm.members[0])
        right = torch.equal(tensor, input_of(0, count, number))
        peer.say("report", right=right, epoch=outcome.epoch, staged=outcome.from_staging, who=outcome.contributors)
    peer.hear("leave")
    comm.leave()
