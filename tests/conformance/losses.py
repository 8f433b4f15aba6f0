"""Programs whose members die by SIGKILL at chosen points of operations, and what the survivors saw of it."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from collectives import faults
from collectives.algorithms import ring
from collectives.communicator import Communicator
from collectives.confirm import confirm
from collectives.errors import MemberLost, TransportLost
from collectives.outcome import Outcome
from collectives.transports.base import Transport
from tests.conformance.values import exact, reduced
from tests.harness.peer import Peer, bits

SMALL = 600
BULK = 1_100_004
"""Elements of single precision whose quarter is more than a transport sends as a note; divisible by 12."""
ROW = 300_000
"""The same where the whole is sent."""
PATTERN = 997


def dying(peer: Peer) -> Callable[[str], None]:
    """The action of a fault: say so, then die without another word."""

    def die(where: str) -> None:
        peer.say("fired", where=where)
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def input_of(member: int, count: int, number: int) -> Tensor:
    """What a member gives to operation `number`: a pattern of exact values, over and over."""
    return _tiled(_pattern(member, number), count)


def average(members: Sequence[int], count: int, number: int) -> Tensor:
    """The average of their inputs."""
    return _tiled(reduced([_pattern(member, number) for member in members], "avg"), count)


def _pattern(member: int, number: int) -> Tensor:
    return exact(member, [PATTERN], torch.float32, "sum", number)


def _tiled(pattern: Tensor, count: int) -> Tensor:
    return pattern.repeat(-(-count // PATTERN))[:count]


def perform(comm: Communicator, kind: str, tensor: Tensor, root: int, **how: Any) -> Outcome:
    """One operation of the kind."""
    actions: dict[str, Callable[[], Outcome]] = {
        "all_reduce": lambda: comm.all_reduce(tensor, "avg", **how),
        "all_reduce out of place": lambda: comm.all_reduce(tensor, "avg", inplace=False, **how),
        "reduce_scatter": lambda: comm.reduce_scatter(tensor, "avg", **how),
        "all_gather": lambda: comm.all_gather(tensor, **how),
        "all_gather to out": lambda: comm.all_gather(tensor, out=torch.zeros(comm.size, *tensor.shape), **how),
        "broadcast from a survivor": lambda: comm.broadcast(tensor, root, **how),
        "broadcast from the victim": lambda: comm.broadcast(tensor, root, **how),
        "barrier": lambda: comm.barrier(**how),
        "exchange": lambda: comm.run(ring.all_reduce(comm.size, tensor.numel()), tensor, **how),
    }
    return actions[kind]()


def expected(kind: str, who: Sequence[int], count: int, number: int, rank: int, root: int) -> Tensor | None:
    """What it must give, by arithmetic, to the member of that rank if these contributed."""
    match kind:
        case "all_reduce" | "all_reduce out of place":
            return average(who, count, number)
        case "reduce_scatter":
            return average(who, count, number).view(len(who), -1)[rank]
        case "all_gather" | "all_gather to out":
            return torch.stack([input_of(member, count, number) for member in who])
        case "exchange":
            return _tiled(reduced([_pattern(member, number) for member in who], "sum"), count)
        case "barrier":
            return None
    return input_of(root, count, number)


def witness(comm: Communicator, kind: str, size: str, number: int, root: int, **how: Any) -> dict[str, Any]:
    """Run one operation and tell all about its end."""
    members, rank = comm.members, comm.rank
    count = SMALL if size == "small" else BULK if kind in SCATTERED else ROW
    tensor = input_of(comm.member_id, count, number)
    before = tensor.clone()
    report: dict[str, Any] = {"before": members, "member": comm.member_id}
    try:
        outcome = perform(comm, kind, tensor, members[root], **how)
    except MemberLost as error:
        report |= {"error": str(error), "lost": error.lost, "survivors": error.survivors}
        report |= {"intact": torch.equal(tensor, before)}
    else:
        who = outcome.contributors
        want = expected(kind, who, count, number, rank, members[root])
        report |= {"contributors": who, "epoch": outcome.epoch, "from_staging": outcome.from_staging}
        report |= {"right": outcome.result is want if want is None else torch.equal(_result(outcome), want)}
        # The bits of a share say nothing to the others.
        report |= {"bits": "" if want is None or kind == "reduce_scatter" else bits(want)}
        report |= {"intact": kind not in OUT_OF_PLACE or torch.equal(tensor, before)}
    return report | {"after": comm.members, "rank": comm.rank}


SCATTERED = ("all_reduce", "all_reduce out of place", "reduce_scatter", "exchange")
OUT_OF_PLACE = ("all_reduce out of place", "reduce_scatter", "all_gather", "all_gather to out", "barrier")


def _result(outcome: Outcome) -> Tensor:
    assert outcome.result is not None
    return outcome.result


def goes_on(comm: Communicator) -> bool:
    """Whether the group works, to the bit, among those that it says are here."""
    total = comm.all_reduce(torch.tensor([comm.member_id]))
    return bool(_result(total).item() == sum(comm.members)) and total.contributors == comm.members


def mortal(peer: Peer, kind: str, point: str, size: str, victims: list[int], algorithm: str) -> None:
    """Rounds of one operation; in each, the member of that rank dies at the point of it."""
    comm = peer.join()
    fault_kind = kind.split(maxsplit=1)[0]
    for number, victim in enumerate(victims):
        assert goes_on(comm)
        if comm.rank == victim:
            faults.arm(point, dying(peer), kind=fault_kind, skip=number % 2 if comm.size > 3 else 0)
        root = victim if kind.endswith("the victim") else (victim + 1) % comm.size
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
