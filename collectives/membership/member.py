"""The member's half of the membership protocol, as a pure state machine.

Events come in by method calls (a message of the coordinator, an operation that is entered, staged or confirmed), what
to send goes out as return values; there is no clock, no socket and no thread here. `session.py` drives it under the
engine lock; the simulation in the tests drives many of them with a network of its own. Rules are those of the recovery
protocol: R1 lanes, R2 completion, R3 epoch change, R5 views.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import msgspec

from collectives.errors import CrossedWaits, DescriptorMismatch, Evicted, MemberLost, QuorumLost, RingholdError
from collectives.membership.protocol import (
    Admit,
    Decision,
    Differs,
    Evict,
    FromPeer,
    LaneReport,
    LaneStatus,
    Leave,
    LinkDown,
    Prepare,
    Report,
    Stalled,
    VerdictKind,
)

MAIN = "main"
"""The lane that operations use when none is named, and that `admit` runs on."""


@dataclass(slots=True)
class Lane:
    """One lane of a member: where its operations stand.

    `view` is the epoch whose ranks the caller sees (rule R5): the attempt that completed the lane's last operation.
    `group` are the members of its sub-group (empty: all).
    """

    entered: int = 0
    complete: int = 0
    complete_epoch: int = 0
    staged: int = 0
    staged_epoch: int = 0
    view: int = 0
    busy: bool = False
    interrupted: int = 0
    kind: str = ""
    phase: str = "idle"
    waiting_for: int = 0
    group: tuple[int, ...] = ()

    def report(self) -> LaneReport:
        """Rule R3's report of this lane."""
        left = self.entered - self.busy
        return LaneReport(
            self.complete, self.complete_epoch, self.staged, self.staged_epoch, self.entered, left, self.group
        )

    def finish(self, seq: int, epoch: int) -> None:
        """Operation `seq` is complete by the attempt of `epoch`."""
        self.complete, self.complete_epoch, self.view = seq, epoch, epoch
        self.staged = self.staged_epoch = 0


class Run(msgspec.Struct, frozen=True):
    """Verdict on an operation: attempt it in this epoch."""

    epoch: int


class Completed(msgspec.Struct, frozen=True):
    """Verdict on an operation: it is complete; the result is in the staging of the attempt of `epoch`."""

    epoch: int


class Wait(msgspec.Struct, frozen=True):
    """Verdict on an operation: the membership is changing."""


@dataclass(slots=True)
class Member:
    """One member's state.

    `epoch` is the last one applied (0: none yet), `promised` the newest number it has fenced for. While
    `promised > epoch` nothing is staged or completed.
    """

    member: int = 0
    epoch: int = 0
    promised: int = 0
    decision: Decision | None = None
    error: RingholdError | None = None
    left: bool = False
    admitting: int = 0
    """The epoch at which this member stands at a safe point, 0 if it does not."""
    lanes: dict[str, Lane] = field(default_factory=dict)
    verdicts: dict[tuple[str, int], RingholdError] = field(default_factory=dict)
    refused: dict[str, RingholdError] = field(default_factory=dict)
    """Lanes that take no operation any more: members disagree about the sub-group."""
    lost: frozenset[int] = frozenset()
    """Members that went since this one came."""
    past: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Members of the epochs that a view or an outcome may still name."""
    outstanding: dict[str, FromPeer] = field(default_factory=dict)
    """What the coordinator must hear again if the connection breaks before it acted."""

    # --- what others may ask ---

    @property
    def fenced(self) -> bool:
        """Whether a change is under way: nothing may stage or complete."""
        return self.promised > self.epoch

    @property
    def members(self) -> tuple[int, ...]:
        """Member ids of the current epoch by rank."""
        return self.past.get(self.epoch, ())

    @property
    def needs_coordinator(self) -> bool:
        """Whether something waits for the coordinator: a change, or what it was asked and has not answered.

        An operation that is under way for too long counts: with its links dead without a sound, this member would wait
        for ever.
        """
        interrupted = any(lane.interrupted == self.epoch for lane in self.lanes.values())
        return self.epoch > 0 and (self.fenced or interrupted or bool(self.outstanding))

    def lane(self, name: str, group: tuple[int, ...] = ()) -> Lane:
        """Return the lane of that name; it starts to exist with its first use, for this group (empty: all members)."""
        if name not in self.lanes:
            self.lanes[name] = Lane(view=self.epoch, group=group)
        return self.lanes[name]

    def members_of(self, name: str, epoch: int) -> tuple[int, ...]:
        """Members of an epoch that a lane's operations run among, by rank."""
        return among(self.lanes[name].group, self.past[epoch])

    def statuses(self) -> list[LaneStatus]:
        """Lanes for a heartbeat; the driver fills in the seconds."""
        return [
            LaneStatus(name, lane.entered, lane.kind, lane.phase, lane.waiting_for, 0.0, lane.group)
            for name, lane in sorted(self.lanes.items())
        ]

    # --- operations ---

    def enter(self, name: str, kind: str) -> int:
        """Begin the lane's next operation and return its sequence number (rule R1: one at a time).

        Raises:
            DescriptorMismatch: members disagree about who is in its sub-group.

        """
        if name in self.refused:
            raise self.refused[name]
        lane = self.lane(name)
        assert not lane.busy, "the lane's lock admits one operation at a time"
        lane.entered += 1
        lane.busy, lane.kind, lane.phase = True, kind, "waiting"
        return lane.entered

    def verdict(self, name: str, seq: int) -> Run | Completed | Wait | RingholdError:
        """Tell what becomes of operation `seq`, which this member has entered and not left."""
        lane = self.lanes[name]
        if lane.complete >= seq:
            return Completed(lane.complete_epoch)
        if self.error is not None:
            return self.error
        if self.fenced:
            return Wait()
        if name in self.refused:
            return self.refused[name]
        if (name, seq) in self.verdicts:
            return self.verdicts[name, seq]
        if lane.interrupted == self.epoch:
            return Wait()
        return Run(self.epoch)

    def stage(self, name: str, seq: int, epoch: int) -> bool:
        """Record that the result of this attempt is whole here. False: too late, the epoch is fenced."""
        if self.fenced or self.epoch != epoch or self.error is not None:
            return False
        lane = self.lanes[name]
        lane.staged, lane.staged_epoch, lane.phase = seq, epoch, "confirming"
        return True

    def complete(self, name: str, seq: int, epoch: int) -> bool:
        """Record that everybody has staged this attempt (rule R2). False: too late, wait for the verdict."""
        lane = self.lanes[name]
        if self.fenced or self.epoch != epoch or (lane.staged, lane.staged_epoch) != (seq, epoch):
            return False
        lane.finish(seq, epoch)
        return True

    def exit(self, name: str, seq: int) -> None:
        """Leave the operation, by result or by error; after an error the caller's view is the current epoch."""
        lane = self.lanes[name]
        lane.busy, lane.phase, lane.waiting_for = False, "idle", 0
        if lane.complete < seq:
            lane.view, lane.staged, lane.staged_epoch = self.epoch, 0, 0
        self.verdicts.pop((name, seq), None)
        self.outstanding.pop(f"stalled {name}", None)

    def interrupt(self, name: str, epoch: int, peer: int) -> list[FromPeer]:
        """Record that an attempt of `epoch` failed on the link to `peer` (own id: unknown, 0: aborted from here)."""
        lane = self.lanes[name]
        if epoch != self.epoch:
            return []
        lane.interrupted = epoch
        return [] if self.fenced or not peer else self.link_down(epoch, peer)

    def link_down(self, epoch: int, peer: int) -> list[FromPeer]:
        """Tell the coordinator of a failed link (rule R11)."""
        if epoch != self.epoch or self.error is not None:
            return []
        return self._ask("link", LinkDown(epoch, peer))

    def complain(self, message: Differs) -> list[FromPeer]:
        """Tell the coordinator that a neighbour's operation is another one."""
        return self._ask(f"differs {message.lane}", message)

    def stalled(self, name: str, seq: int) -> list[FromPeer]:
        """Tell the coordinator, once in an epoch, that operation `seq` is under way for too long (rule R11)."""
        lane = self.lanes[name]
        if not lane.busy or lane.entered != seq or self.fenced or self.error is not None:
            return []
        if f"stalled {name}" in self.outstanding:
            return []
        return self._ask(f"stalled {name}", Stalled(self.epoch, name, seq))

    def admit(self) -> list[FromPeer]:
        """Stand at a safe point of the current epoch (rule R13) until a decision says that all did."""
        self.admitting = self.epoch
        return self._ask("admit", Admit(self.epoch))

    def leave(self, reason: str) -> list[FromPeer]:
        """Go, with notice; the coordinator answers with `Evict("left")`."""
        return self._ask("leave", Leave(reason[:2000]))

    def _ask(self, key: str, message: FromPeer) -> list[FromPeer]:
        self.outstanding[key] = message
        return [message]

    # --- membership ---

    def on_prepare(self, message: Prepare) -> list[FromPeer]:
        """Rule R3: fence and report, unless something newer was promised."""
        if message.epoch < self.promised or message.epoch <= self.epoch or self.error is not None:
            return []
        self.promised = message.epoch
        report = Report(message.epoch, {name: lane.report() for name, lane in self.lanes.items()})
        self.outstanding = {k: m for k, m in self.outstanding.items() if k == "leave"}
        return self._ask("report", report)

    def on_decision(self, decision: Decision) -> bool:
        """Apply an announced epoch. False if it is not for us: seen before, or older than what was promised."""
        if decision.epoch < self.promised or decision.epoch <= self.epoch or self.error is not None:
            return False
        if self.member not in (info.member for info in decision.members):
            return False
        first = self.epoch == 0
        if first:
            for name, frontier in decision.lanes.items():
                self.lanes[name] = Lane(
                    entered=frontier.entered, complete=frontier.complete, complete_epoch=frontier.complete_epoch
                )
        else:
            self._carry_over(decision)
        self.epoch = self.promised = decision.epoch
        self.decision = decision
        self.lost |= set(decision.lost)
        self.past[decision.epoch] = tuple(info.member for info in decision.members)
        for verdict in decision.verdicts:
            if verdict.error == "disputed":
                self.refused.setdefault(verdict.lane, self._error(verdict.error, verdict.message))
                continue
            lane = self.lanes.get(verdict.lane, Lane())
            if lane.entered < verdict.seq or (lane.entered == verdict.seq and lane.busy):
                # The first one stands: other members may have raised it already.
                key = (verdict.lane, verdict.seq)
                self.verdicts.setdefault(key, self._error(verdict.error, verdict.message))
        if first or decision.admitted:
            for lane in self.lanes.values():
                lane.view = decision.epoch
        self.outstanding = {k: m for k, m in self.outstanding.items() if k == "leave"}
        self._again(decision)
        return True

    def on_evict(self, message: Evict) -> None:
        """Stop being a member, for good: every operation ends with the error, or completed."""
        self.left = message.kind == "left"
        self.fail(QuorumLost(message.reason) if message.kind == "quorum" else Evicted(message.reason))

    def fail(self, error: RingholdError) -> None:
        """Stop being a member by our own decision (rule R4: give up means depart)."""
        if self.error is None:
            self.error = error

    def forget(self) -> None:
        """Drop the member lists that no view can name any more."""
        if len(self.past) == 1:
            return
        keep = {self.epoch}
        for lane in self.lanes.values():
            keep |= {lane.view, lane.staged_epoch, lane.complete_epoch}
        self.past = {epoch: members for epoch, members in self.past.items() if epoch in keep}

    def _carry_over(self, decision: Decision) -> None:
        """Complete what all survivors staged, discard the rest."""
        for name, frontier in decision.lanes.items():
            lane = self.lane(name, frontier.group)
            attempt = (frontier.complete, frontier.complete_epoch)
            if lane.complete < frontier.complete and (lane.staged, lane.staged_epoch) == attempt:
                lane.finish(*attempt)
        for lane in self.lanes.values():
            lane.staged = lane.staged_epoch = lane.interrupted = 0

    def _again(self, decision: Decision) -> None:
        """Ask again for what the change left open."""
        if self.admitting and decision.admitted:
            self.admitting = 0
        elif self.admitting:
            self.admitting = decision.epoch
            self.outstanding["admit"] = Admit(decision.epoch)

    def _error(self, kind: VerdictKind, message: str) -> RingholdError:
        if kind in ("mismatch", "disputed"):
            return DescriptorMismatch(message)
        if kind == "crossed":
            return CrossedWaits(message)
        return MemberLost(message, survivors=self.members)


@lru_cache(maxsize=1024)
def among(group: tuple[int, ...], members: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a sub-group (empty: all) that are members, by rank."""
    here = set(members)
    return tuple(member for member in group if member in here) if group else members
