"""How a simulated process runs one operation: as `group.py` does, with headers, confirmations and verdicts.

An operation here has no data: the headers carry the contributions, and the result is who contributed.
"""

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from collectives.errors import CrossedWaits, DescriptorMismatch, MemberLost, RingholdError
from collectives.membership.member import Completed, Wait
from collectives.membership.protocol import Differs
from tests.membership.mesh import Lost, Mesh

if TYPE_CHECKING:
    from tests.membership.host import Host

Steps = Generator[None, None, None]


class Quit(Exception):
    """Somebody interrupted this process."""


class Header(msgspec.Struct, frozen=True, gc=False):
    """As `descriptor.Descriptor`. A note is one with the bit that the sender contributes, or a confirmation."""

    seq: int
    view: tuple[int, ...]
    kind: str
    root: int
    on_loss: str
    refused: bool = False
    """The sender takes no part: members that it counted on are gone."""


@dataclass(slots=True)
class Call:
    """One operation that a thread has issued, with the view that it had then."""

    kind: str
    on_loss: str
    lane: str
    view: int
    members: tuple[int, ...]
    root: int
    bit: bool = False
    result: bool = False
    """Of the attempt that was staged last: whether anybody contributed a set bit."""

    @property
    def elastic(self) -> bool:
        """Whether fewer members may run it again."""
        return self.on_loss == "retry" and self.kind != "shape"


class Runner:
    """Runs the operations of one host."""

    def __init__(self, host: "Host") -> None:
        self.host = host
        self.history = host.world.history
        self.judge = host.world.judge
        self._armed = host.world.armed
        self._random = host.rng.random

    def run(self, call: Call) -> Generator[None, None, str]:
        """Call an operation; returns how it ended: "done", "waiting" (a joiner) or the name of its error.

        Raises what means that this member is out of the run.
        """
        host, core, name = self.host, self.host.core, call.lane
        if core.error is not None:
            raise core.error
        seq = core.enter(name, call.kind)
        self.judge.entered(host, name, seq)
        try:
            yield from self.point("enter")
            epoch = yield from self._settle(call, seq)
            yield from self.point("returned")
            self.judge.returned(host, name, seq, epoch)
        except (MemberLost, DescriptorMismatch, CrossedWaits) as error:
            self.judge.raised(host, name, seq, error)
            return type(error).__name__
        finally:
            self.judge.left(host, name, seq)
            if not host.dead:
                core.exit(name, seq)
                core.forget()
        return "waiting" if call.result else "done"

    def point(self, name: str) -> Iterable[None]:
        """Reach a point where a fault may strike or another thread run."""
        host = self.host
        if name in self._armed:
            host.probe(name)
        if host.stopped or self._random() < self.history.preempt:
            host.poke()
            return self._preempted()
        if host.quits:
            self._quit_if_told()
        return ()  # most often: no generator for nothing

    def _preempted(self) -> Steps:
        yield
        self._quit_if_told()

    def _quit_if_told(self) -> None:
        host = self.host
        if host.quits:
            host.quits = False
            raise Quit

    def _settle(self, call: Call, seq: int) -> Generator[None, None, int]:
        host, core, name = self.host, self.host.core, call.lane
        lane = core.lanes[name]
        last = attempts = 0
        while True:
            verdict = core.verdict(name, seq)
            if isinstance(verdict, RingholdError):
                raise verdict
            if isinstance(verdict, Completed):
                self.judge.count("completed from staging" if attempts else "completed before it was attempted")
                if last != verdict.epoch:
                    self.judge.fail(f"{host.name}: {name} {seq} is complete by {verdict.epoch}, staged is {last}")
                return last
            mesh = host.mesh
            if isinstance(verdict, Wait) or mesh is None or mesh.epoch != verdict.epoch:
                lane.phase, lane.waiting_for = "recovering", 0
                yield
                continue
            if core.member not in mesh.ready:
                yield
                continue
            members = core.members_of(name, verdict.epoch)
            yield from self.point("verdict")
            if call.members != members:
                yield from self._refuse_if_lost(call, seq, mesh, members)
            attempts += 1
            last = mesh.epoch
            if attempts > 1:
                self.judge.count("ran again")
            self.judge.attempts(host, name, seq, last)
            try:
                yield from self._attempt(call, seq, mesh, members)
            except Lost as error:
                if self.history.drowsy and host.rng.random() < 0.5:
                    yield from host.sleep(host.world.lag(1.0))
                host.post(core.interrupt(name, last, error.peer))
                host.poke()
                yield
            else:
                return last

    def _attempt(self, call: Call, seq: int, mesh: Mesh, members: tuple[int, ...]) -> Steps:
        host, core, name = self.host, self.host.core, call.lane
        me, epoch = core.member, mesh.epoch
        bit, contributors = call.bit, {me}
        if len(members) > 1:
            bit = yield from self._agree(call, seq, mesh, members, contributors)
        core.lanes[name].phase = "moving"
        yield from self.point("moved")
        if not core.stage(name, seq, epoch):
            raise Lost(0)
        call.result = bit
        self.judge.staged(host, name, seq, epoch, contributors if call.kind in ("all_reduce", "shape") else None)
        yield from self.point("staged")
        yield from self._confirm(name, seq, mesh, members)
        yield from self.point("confirming")
        if not core.complete(name, seq, epoch):
            raise Lost(0)
        self.judge.completed(host, name, seq, epoch)
        yield from self.point("confirmed")

    def _agree(
        self, call: Call, seq: int, mesh: Mesh, members: tuple[int, ...], contributors: set[int]
    ) -> Generator[None, None, bool]:
        """Exchange headers with whom the kind has links in use with, and around the ring."""
        core, name = self.host.core, call.lane
        me, lane = core.member, core.lanes[call.lane]
        mine = self._header(call, seq)
        rank, size = members.index(me), len(members)
        senders, receivers = [members[rank - 1]], [members[(rank + 1) % size]]
        if call.kind in ("all_reduce", "shape"):
            senders = receivers = [m for m in members if m != me]
        elif call.kind == "broadcast" and me != call.root:
            senders = list(dict.fromkeys([*senders, call.root]))
        elif call.kind == "broadcast":
            receivers = [m for m in members if m != me]
        for peer in receivers:
            mesh.send(me, peer, name, (mine, call.bit))
        yield from self.point("sent")
        bit = call.bit
        for peer in senders:
            lane.phase, lane.waiting_for = "waiting", peer
            while True:
                note = mesh.take(me, peer, name) or (yield from self._take(mesh, peer, name))
                if isinstance(note, int):
                    # That peer is in an operation of another kind, with which this one has no link in use.
                    self.judge.count("skipped a confirmation")
                    continue
                theirs, set_there = note
                if mine == theirs:
                    break
                if theirs.seq >= seq:
                    self._complain(mine, theirs, call.lane, mesh.epoch, peer)
                self.judge.count("skipped an older header")
            contributors.add(peer)
            bit = bit or set_there
        lane.waiting_for = 0
        return bit

    def _confirm(self, name: str, seq: int, mesh: Mesh, members: tuple[int, ...]) -> Steps:
        """As `confirm.confirm`: a dissemination barrier."""
        me, size, distance = self.host.core.member, len(members), 1
        rank = members.index(me)
        while distance < size:
            mesh.send(me, members[(rank + distance) % size], name, seq)
            peer = members[(rank - distance) % size]
            theirs = mesh.take(me, peer, name) or (yield from self._take(mesh, peer, name))
            if theirs != seq:
                self.judge.fail(f"{self.host.name}: {peer} confirmed {theirs}, not {seq}")
            distance *= 2

    def _take(self, mesh: Mesh, peer: int, name: str) -> Generator[None, None, Any]:
        me = self.host.core.member
        while (note := mesh.take(me, peer, name)) is None:
            if self.host.quits:
                self._quit_if_told()
            yield
        return note

    def _header(self, call: Call, seq: int) -> Header:
        return Header(seq, () if call.elastic else call.members, call.kind, call.root, call.on_loss)

    def _complain(self, mine: Header, theirs: Header, lane: str, epoch: int, other: int) -> None:
        core = self.host.core
        by_view = (
            bool(mine.view and theirs.view and mine.view != theirs.view)
            and msgspec.structs.replace(mine, view=theirs.view) == theirs
        )
        lost = theirs.refused or by_view or theirs.seq > mine.seq
        self.judge.count("differs by a loss" if lost else "differs")
        self.host.post(core.complain(Differs(epoch, lane, mine.seq, str(mine), str(theirs), other, lost)))
        raise Lost(0)

    def _refuse_if_lost(self, call: Call, seq: int, mesh: Mesh, members: tuple[int, ...]) -> Steps:
        core = self.host.core
        lost = tuple(m for m in call.members if m not in members)
        if not lost or (call.elastic and call.root not in lost):
            return
        me = core.member
        if len(members) > 1:
            with suppress(Lost):
                note = msgspec.structs.replace(self._header(call, seq), refused=True)
                mesh.send(me, members[(members.index(me) + 1) % len(members)], call.lane, (note, call.bit))
        yield from self.point("refusing")
        self.judge.count("refused by its own view")
        raise MemberLost("lost", lost, members)
