"""Programs of sub-groups: some members' operations under deaths inside and outside, disputes, and what they cost."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import DescriptorMismatch, LaneMisuse, MemberLost, UsageError
from collectives.membership.coordinator import Coordinator
from collectives.membership.protocol import FromPeer
from collectives.membership.server import run_coordinator
from collectives.options import Options
from collectives.outcome import Outcome
from collectives.subgroup import SubGroup
from tests.conformance.kinds import input_of
from tests.conformance.lanes import ask_for_error, total_of
from tests.conformance.losses import dying, goes_on, witness
from tests.harness.peer import Peer


def ranked(comm: Communicator, *ranks: int, name: str = "") -> SubGroup:
    """The sub-group of the members of these ranks."""
    return comm.group([comm.members[rank] for rank in ranks], name)


def sums(group: SubGroup, **how: Any) -> tuple[int, ...]:
    """Add up the ids of a sub-group; who contributed, which must be all of it, and the sum right."""
    outcome: Outcome = group.all_reduce(torch.tensor([group.member_id]), **how)
    assert total_of(outcome) == sum(outcome.contributors)
    return outcome.contributors


def every_kind(comm: Communicator) -> list[str]:
    """Run every kind in two overlapping sub-groups at once; says what was not right."""
    wrong: list[str] = []
    kinds = ["all_reduce", "reduce_scatter", "all_gather", "broadcast from a survivor", "barrier", "exchange"]

    def work(group: SubGroup) -> None:
        for number, (kind, size) in enumerate((kind, size) for kind in kinds for size in ("small", "bulk")):
            report = witness(cast(Communicator, group), kind, size, number, 1)
            if not report["right"] or tuple(report["contributors"]) != group.members:
                wrong.append(f"{kind} {size} of {group.name}")

    with ranked(comm, 0, 1, 2, name="low") if comm.rank < 3 else ranked(comm, 3, 2, name="high") as group:
        if comm.rank != 2:
            work(group)
        else:
            with ranked(comm, 3, 2, name="high") as high:
                assert high.rank == 1
                thread = threading.Thread(target=work, args=(high,))
                thread.start()
                work(group)
                thread.join()
    return wrong


def refused(comm: Communicator) -> list[str]:
    """Ask for sub-groups that cannot be; what that says. Nothing is sent."""
    me, other = comm.member_id, comm.members[1 - comm.rank]
    wrong: list[Any] = [[me, me], [me, 77], [other], [], [me, other]]
    comm.group([me], "mine").barrier()
    said = [ask_for_error(lambda who=who: comm.group(who, "mine"), UsageError) for who in wrong]
    said += [ask_for_error(lambda: comm.group([me], "a@b"), UsageError)]
    with comm.group([me]) as alone:
        assert alone.all_reduce(torch.ones(1)).contributors == (me,)
    said += [ask_for_error(alone.barrier, UsageError), ask_for_error(lambda: comm.barrier(lane="x#y"), UsageError)]
    return said


def outsider_dies(peer: Peer, kinds: list[str], point: str) -> None:
    """Ranks 0 to 2 hold still at a point of an operation of theirs, while an outsider is killed; once for each kind."""
    comm = peer.join()
    peer.say("rank", rank=comm.rank)
    if comm.rank > 2:
        peer.hear("nothing: it is killed")
    group = cast(Communicator, ranked(comm, 0, 1, 2))
    for number, kind in enumerate(kinds):
        if comm.rank == number % 3:

            def hold(where: str) -> None:
                peer.say("reached", where=where)
                peer.hear("killed")

            faults.arm(point, hold, kind=kind.split(maxsplit=1)[0])
        peer.say("report", **witness(group, kind, "bulk" if number % 2 else "small", number, 1))
        assert faults.disarm() == 0
    peer.hear("leave")
    comm.leave()


def insider_dies(peer: Peer, kind: str, point: str) -> dict[str, Any]:
    """Rank 0 dies in an operation of ranks 0 to 2, while ranks 2 to 4 go on in a sub-group of theirs."""
    comm = peer.join()
    everybody = comm.members
    report: dict[str, Any] = {}
    if comm.rank < 3:
        first = cast(Communicator, ranked(comm, 0, 1, 2))
        if comm.rank == 0:
            faults.arm(point, dying(peer), kind=kind.split(maxsplit=1)[0])
    if comm.rank > 1:
        seen: Counter[tuple[int, ...]] = Counter()
        thread = threading.Thread(target=_until_a_loss, args=(ranked(comm, 2, 3, 4), peer, seen))
        thread.start()
    if comm.rank < 3:
        report = witness(first, kind, "small", 0, 0 if kind.endswith("the victim") else 1)
    if comm.rank > 1:
        thread.join()
        assert list(seen) == [everybody[2:]], seen
    assert goes_on(comm)
    comm.leave()
    return report


def _until_a_loss(group: SubGroup, peer: Peer, seen: Counter[tuple[int, ...]]) -> None:
    """Add up again and again, until every member of the sub-group has been told of a loss."""
    told = 0
    while not told:
        seen[sums(group)] += 1
        told = int(any(one.get("lost") for one in list(peer.events)))
        told = total_of(group.all_reduce(torch.tensor([told]), "min"))


def busy_lanes(peer: Peer, skip: int) -> dict[str, list[list[int]]]:
    """Rank 1 dies while two sub-groups that it is in have three lanes busy; who contributed to what, per lane."""
    comm = peer.join()
    assert goes_on(comm)
    low = ranked(comm, 0, 1, 2) if comm.rank < 3 else None
    high = ranked(comm, 1, 2, 3) if comm.rank > 0 else None
    if comm.rank == 1:
        faults.arm("transfer", dying(peer), skip=skip)
    places = {"low a": (low, "a"), "low b": (low, "b"), "high a": (high, "a")}
    works, tensors = [], []
    for number in range(4):
        for place, (group, lane) in places.items():
            if group is not None:
                tensors.append(input_of(comm.member_id, 20_000, number))
                works.append((place, number, group.all_reduce(tensors[-1], lane=lane, async_op=True)))
    seen: dict[str, list[list[int]]] = {}
    for (place, number, work), tensor in zip(works, tensors, strict=True):
        who = work.wait().contributors
        assert torch.equal(tensor, torch.stack([input_of(member, 20_000, number) for member in who]).sum(0))
        seen.setdefault(place, []).append(list(who))
    assert goes_on(comm)
    comm.leave()
    return seen


def stepping(peer: Peer, point: str, on_loss: str) -> list[bool]:
    """Rank 0 dies in a step, in an operation of ranks 0 and 1; ranks 2 and 3 have theirs. What became of two steps."""
    comm = peer.join()
    group = ranked(comm, 0, 1) if comm.rank < 2 else ranked(comm, 2, 3)
    if comm.rank == 0:
        faults.arm(point, dying(peer))
    story = []
    for _ in range(2):
        with comm.step() as step:
            for _ in range(2):
                group.all_reduce(torch.ones(1000), on_loss=on_loss)
        story.append(step.committed)
    comm.leave()
    return story


def disputed(peer: Peer, claims: list[list[int]], times: int) -> dict[str, Any]:
    """Members mean different sub-groups by one name; how many operations were good before that was found out."""
    comm = peer.join()
    assert goes_on(comm)
    good = 0
    said: list[str] = []
    group = ranked(comm, *claims[comm.rank], name="tp")
    while len(said) < times:
        tensor = torch.ones(50_000)
        try:
            assert group.all_reduce(tensor).contributors == group.members
            good += 1
        except DescriptorMismatch as error:
            assert tensor.eq(1).all()
            said.append(str(error))
    assert goes_on(comm)
    comm.leave()
    return {"said": said, "good": good}


def admitting(peer: Peer) -> dict[str, Any]:
    """Founders let a third in while they have a sub-group; busy, it is in the way."""
    comm = peer.join()
    founder, said = comm.founder, ""
    peer.say("rank", rank=comm.rank)
    if founder:
        group = ranked(comm, 0, 1)
        sums(group)
        if comm.rank == 0:
            faults.arm("enter", lambda where: _hear(peer, "go"))
            work = group.barrier(lane="aux", async_op=True)
            said = ask_for_error(comm.admit, LaneMisuse)
            peer.say("busy")
            work.wait()
        else:
            group.barrier(lane="aux")
        while not comm.admit():
            pass
        assert sums(group) == comm.members[:2]
        strangers = ask_for_error(lambda: comm.group([comm.member_id, 99]), UsageError)
        assert "[99] are no members" in strangers
    comm.sync({})
    everybody = ranked(comm, 0, 1, 2)
    result = {"said": said, "all": sums(everybody), "members": comm.members}
    comm.leave()
    return result


def _hear(peer: Peer, word: str) -> None:
    peer.hear(word)


def frugal(peer: Peer) -> int:
    """Found a run, use sub-groups and messages much, and tell the test when it begins and ends."""
    comm = peer.join()
    groups = [ranked(comm, 0, 1, 2)] + ([ranked(comm, 0, 1)] if comm.rank < 2 else [])
    tensor = torch.zeros(10)
    comm.barrier()
    peer.say("begins")
    peer.hear("go")
    for _ in range(50):
        for group in groups:
            sums(group)
        if comm.rank == 0:
            comm.send(tensor, comm.members[1])
        elif comm.rank == 1:
            comm.recv(tensor, comm.members[0])
    peer.say("ends")
    peer.hear("leave")
    comm.leave()
    return comm.size


def counting(peer: Peer, founders: int, journal: str) -> None:
    """A coordinator that says, when asked, what it has received so far, by kind."""
    seen: Counter[str] = Counter()
    hear = Coordinator.on_message

    def count(self: Coordinator, connection: int, message: FromPeer, now: float) -> Any:
        seen[type(message).__name__] += 1
        return hear(self, connection, message, now)

    def answer() -> None:
        while True:
            peer.hear("count", timeout=3600.0)
            peer.say("counted", seen=dict(seen))

    Coordinator.on_message = count  # type: ignore[method-assign]
    threading.Thread(target=answer, daemon=True).start()
    run_coordinator(
        "127.0.0.1",
        0,
        Path(journal),
        run=peer.setting["run"],
        token=peer.setting["token"].encode(),
        options=Options.resolve({**peer.setting["options"], "founders": founders}, {}),
        new=True,
        ready=lambda port: peer.say("listening", port=port),
    )


def halting(peer: Peer) -> list[str]:
    """Rank 0 dies before operation 2 of a sub-group whose operations raise after a loss; another lane goes on."""
    comm = peer.join()
    if comm.rank > 1:
        assert goes_on(comm)
        comm.leave()
        return []
    group = ranked(comm, 0, 1)
    sums(group)
    if comm.rank == 0:
        faults.arm("enter", dying(peer))
    story = []
    for lane in ("main", "main", "other"):
        try:
            story.append(str(len(sums(group, on_loss="raise", lane=lane))))
        except MemberLost as error:
            story.append("call resume() first" if "call resume() first" in str(error) else "lost")
    group.resume()
    story.append(str(len(sums(group, on_loss="raise"))))
    assert goes_on(comm)
    comm.leave()
    return story
