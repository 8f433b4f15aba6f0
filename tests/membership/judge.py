"""Watches a simulated run and fails it when a rule of the protocol is broken; counts what it has seen.

It knows everything that happened on every host, dead ones too, and uses none of the code under test to judge it.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from collectives.errors import RingholdError
from collectives.membership.protocol import (
    Decision,
    Evict,
    FromCoordinator,
    FromPeer,
    Prepare,
    Prepared,
    Record,
    Report,
)
from tests.membership.history import PATIENCE

if TYPE_CHECKING:
    from tests.membership.host import Host
    from tests.membership.world import World

Key = tuple[int, str, int]
"""An operation: the era (the epoch in which its run began anew), lane and number."""


_NOBODY: frozenset[int] = frozenset()


class Violation(AssertionError):
    """A rule was broken."""


class Judge:
    """The rules, as assertions over the whole run."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.tracing = world.lines is not None
        self.seen: defaultdict[str, int] = defaultdict(int)
        self.deviates = False
        self.decisions: dict[int, Decision] = {}
        self.groups: dict[str, tuple[int, ...]] = {}
        """Members of the sub-groups that lanes belong to, as those say who opened them."""
        self._concerned: dict[tuple[str, int], set[int]] = {}
        self._era: dict[int, int] = {0: 0}
        self._before: dict[int, int] = {0: 0}
        self._latest = 0
        self._durable: set[int] = set()
        self._prepares: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._promised: dict[Host, int] = {}
        self._applied: dict[Host, list[int]] = {}
        self._reports: dict[tuple[int, int], Report] = {}
        self._staged: dict[tuple[Key, int], set[int]] = {}
        self._returned: dict[Key, dict[Host, int]] = {}
        self._raised: dict[Key, dict[Host, RingholdError]] = {}
        self._entered: dict[tuple[Host, str], int] = {}
        """The last operation of a lane, negative when it is left."""
        self._newest_attempt: dict[Key, int] = {}
        self._views: dict[Key, int] = {}
        self._lost: set[int] = set()
        self._disputed: set[str] = set()
        self._left: set[int] = set()

    def count(self, what: str) -> None:
        """Note that something happened."""
        self.seen[what] += 1

    def saw(self, message: FromPeer) -> None:
        """Note a message that the coordinator received."""
        self.seen[type(message).__name__] += 1

    def fail(self, why: str) -> None:
        """Raise `Violation`."""
        self.world.say(f"VIOLATION: {why}")
        raise Violation(why)

    # --- the coordinator ---

    def persisted(self, record: Record) -> None:
        """A record is on disk."""
        if isinstance(record, Prepared):
            if record.epoch <= max(self._durable, default=0):
                self.fail(f"number {record.epoch} was used before")
            self._durable.add(record.epoch)
        if isinstance(record, Decision):
            self._decided(record)

    def _decided(self, decision: Decision) -> None:
        number = decision.epoch
        if number in self.decisions or number <= self._latest:
            self.fail(f"epoch {number} is decided again, or after {self._latest}")
        self._durable.add(number)
        before = self.decisions.get(self._latest)
        old = {info.member for info in before.members} if before else set()
        members = [info.member for info in decision.members]
        survivors = [m for m in members if m in old]
        if self.tracing:
            verdicts = [(v.lane, v.seq, v.error) for v in decision.verdicts]
            lanes = {name: (f.complete, f.complete_epoch) for name, f in decision.lanes.items()}
            self.world.say(
                f"DECISION {number}: members {members} lost {decision.lost} joined {decision.joined} "
                f"admitted {decision.admitted} verdicts {verdicts} lanes {lanes}"
            )
        for info in decision.members:
            # Not from Welcome: who never was in an epoch may have an id that another gets after a restart.
            self.world.host_of[info.member] = self.world.hosts[int(info.host.removeprefix("host"))]
        self._era[number] = self._era[self._latest] if survivors else number
        self._before[number], self._latest = self._latest, number
        self.decisions[number] = decision
        self._lost |= old.difference(members)
        if len(set(members)) < len(members) or self._lost.intersection(members):
            self.fail(f"epoch {number} has members {members}, of which {sorted(self._lost)} were lost before")
        options = self.world.history.options
        if members and old and options.quorum and 2 * len(survivors) <= len(old):
            self.fail(f"epoch {number} has {len(survivors)} of {len(old)} members, against the quorum")
        if members and len(members) < options.min_members:
            self.fail(f"epoch {number} has {len(members)} members, fewer than min_members")
        if not old and members and self._before[number] == 0 and len(members) < options.founders:
            self.fail(f"the first epoch has {len(members)} members, {options.founders} must found")
        if survivors and len(survivors) < len(members):
            self._admission(decision, survivors)
        for verdict in decision.verdicts:
            self.count(f"verdict {verdict.error}")
            if verdict.error == "disputed":
                self._disputed.add(verdict.lane)
        if decision.ended:
            self.count("ended")
        if not members:
            self.count("nobody left")
        if before and members and not decision.lost and not decision.joined:
            self.count("same members")

    def _admission(self, decision: Decision, survivors: list[int]) -> None:
        """Rule R13: joiners come in when all stand at a safe point with equal frontiers."""
        self.count("joiners admitted")
        rows: dict[str, dict[int, tuple[int, int]]] = {}
        for member in survivors:
            host = self.world.host_of[member]
            if not host.core.admitting:
                self.fail(f"epoch {decision.epoch} lets {decision.joined} in; member {member} is at no safe point")
            if any(lane.busy for lane in host.core.lanes.values()):
                self.fail(f"epoch {decision.epoch} lets {decision.joined} in; member {member} is in an operation")
            for name, lane in host.core.lanes.items():
                rows.setdefault(name, {})[member] = (lane.entered, lane.complete)
        for name, row in rows.items():
            stands = {row.get(m, (0, 0)) for m in survivors if m in self.groups.get(name, survivors)}
            if len(stands) > 1 and name not in self._disputed:
                self.fail(f"epoch {decision.epoch} lets {decision.joined} in; lane {name} stands at {stands}")

    def _told(self, host: "Host", told: Decision) -> bool:
        """Whether this is what a member of a decision is to be told: all of it but for others' sub-groups.

        Who is no member of it, a joiner that has reported for the next one, is told nothing of it.
        """
        whole = self.decisions.get(told.epoch)
        me = next((info.member for info in whole.members if info.host == f"host{host.index}"), 0) if whole else 0
        if whole is None or not me:
            return False
        mine = {name for name in whole.lanes if me in self.groups.get(name, (me,))}
        lanes = {name: frontier for name, frontier in whole.lanes.items() if name in mine}
        verdicts = [v for v in whole.verdicts if v.lane in mine or v.lane not in whole.lanes]
        return (told.lanes, told.verdicts) == (lanes, verdicts) and (told.members, told.nonce, told.lost) == (
            whole.members,
            whole.nonce,
            whole.lost,
        )

    def sends(self, message: FromCoordinator, host: "Host | None") -> None:
        """A message leaves the coordinator."""
        self.seen[type(message).__name__] += 1
        if isinstance(message, Prepare):
            if message.epoch not in self._durable:
                self.fail(f"Prepare {message.epoch} is sent and not on disk")
            use = (self.world.headquarters.incarnation, tuple(message.members))
            if self._prepares.setdefault(message.epoch, use) != use:
                self.fail(f"number {message.epoch} is used twice: {self._prepares[message.epoch]} and {use}")
        if isinstance(message, Decision) and host is not None and not self._told(host, message):
            self.fail(f"decision {message.epoch} is announced and not on disk, or another is")

    def stopped(self, reason: str) -> None:
        """The coordinator stops itself: its journal is never old here."""
        self.fail(f"the coordinator stopped: {reason}")

    def restarted(self, last: Record) -> None:
        """The coordinator starts again; the last record is the one it died behind."""
        self.count(f"restart after {type(last).__name__}")

    # --- members ---

    def promised(self, host: "Host", epoch: int, report: FromPeer) -> None:
        """A member has fenced and reports."""
        if epoch < self._promised.get(host, 0):
            self.fail(f"{host.name} promised {epoch} after {self._promised[host]}")
        assert isinstance(report, Report)
        key = (epoch, host.core.member)
        if key in self._reports:
            self.count("reported again")
            old = self._reports[key]
            for name, row in report.lanes.items():
                was = old.lanes.get(name)
                if was is not None and (was.complete, was.staged, was.staged_epoch) != (
                    row.complete,
                    row.staged,
                    row.staged_epoch,
                ):
                    self.fail(f"{host.name} reports {row} for {epoch}, and said {was} before")
        self._reports[key] = report
        if self._promised.get(host, 0) > host.core.epoch and self._promised[host] != epoch:
            self.count("change abandoned")
        self._promised[host] = epoch

    def applied(self, host: "Host", decision: Decision, before: int) -> None:
        """A member has applied an epoch."""
        number, member = decision.epoch, host.core.member
        if not self._told(host, decision):
            self.fail(f"{host.name} applies epoch {number}, which is not on disk")
        if number <= before or number < self._promised.get(host, 0):
            self.fail(f"{host.name} applies {number} at epoch {before}, promised {self._promised.get(host)}")
        previous = self._before[number]
        while before and previous > before:
            if any(info.member == member for info in self.decisions[previous].members):
                self.fail(f"{host.name} goes from epoch {before} to {number} and misses {previous}")
            previous = self._before[previous]
        self._applied.setdefault(host, []).append(number)
        self._promised[host] = max(number, self._promised.get(host, 0))
        self.world.say(f"{host.name} applies {number}")

    def admitted(self, host: "Host") -> None:
        """A call of `admit` has returned: on all with the same view."""
        self.count("admit returned")
        lane = host.core.lanes["main"]
        key = self._key(host, "admit", lane.entered, host.core.epoch)
        if self._views.setdefault(key, lane.view) != lane.view:
            self.fail(f"{host.name} sees epoch {lane.view} after admit {lane.entered}, others {self._views[key]}")

    def evicted(self, host: "Host", message: Evict) -> None:
        """A member is told that it is out."""
        self.count(f"told {message.kind}")
        self.world.say(f"{host.name} is told: {message.reason}")
        if message.kind == "left" and self.world.headquarters.incarnation == 1:
            # That somebody left with notice is known until the end of the coordinator, no longer.
            self._left.add(host.core.member)
            members = {info.member for info in self.decisions[self._latest].members}
            if members and members <= self._left:
                self.fail(f"{host.name} was the last member and left, and that is not on disk")
        options = self.world.history.options
        dissolves = options.quorum or options.min_members > 1
        if "absent from operation" in message.reason and self.world.headquarters.away > PATIENCE / 2:
            return  # others waited long, but for the coordinator's word; whoever is slow then is taken for absent
        # Whoever was away when the members were too few learns only that it is no member.
        if message.kind == "evicted" and host.core.epoch and not host.suspect and not dissolves:
            self.fail(f"{host.name} did nothing wrong and is told: {message.reason}")

    # --- operations ---

    def _key(self, host: "Host", lane: str, seq: int, epoch: int) -> Key:
        return self._era[epoch], lane, seq

    def _members(self, lane: str, epoch: int) -> set[int]:
        """Whom an attempt of this lane in this epoch is for."""
        members = self._concerned.get((lane, epoch))
        if members is None:
            everybody = {info.member for info in self.decisions[epoch].members}
            members = self._concerned[lane, epoch] = everybody.intersection(self.groups.get(lane, everybody))
        return members

    def entered(self, host: "Host", lane: str, seq: int) -> None:
        """Rule R1: a member enters a lane's operations one behind the other, each when the last one has ended."""
        before = self._entered.get((host, lane), 1 - seq)
        if seq != 1 - before:
            self.fail(f"{host.name} enters {lane} {seq} after {abs(before)}{', which goes on' if before > 0 else ''}")
        self._entered[host, lane] = seq

    def left(self, host: "Host", lane: str, seq: int) -> None:
        """A member leaves an operation, by a result or by an error."""
        self._entered[host, lane] = -seq

    def attempts(self, host: "Host", lane: str, seq: int, epoch: int) -> None:
        """A member begins an attempt."""
        key = self._key(host, lane, seq, epoch)
        if self.tracing:
            self.world.say(f"{host.name} attempts {lane} {seq} in epoch {epoch}")
        if host.core.error is not None:
            self.fail(f"{host.name} runs {lane} {seq} and is out of the run: {host.core.error}")
        for other, done in self._returned.get(key, {}).items():
            if done < epoch:
                self.fail(f"{host.name} runs {lane} {seq} in {epoch}; {other.name} returned that of {done}")
        self._newest_attempt[key] = max(epoch, self._newest_attempt.get(key, 0))

    def staged(self, host: "Host", lane: str, seq: int, epoch: int, contributors: set[int] | None) -> None:
        """A member has staged a result; `contributors` are those whose data are in it, None: not told."""
        if self._promised.get(host, 0) > epoch:
            self.fail(f"{host.name} stages {lane} {seq} of epoch {epoch} and promised {self._promised[host]}")
        members = self._members(lane, epoch)
        if contributors is not None and contributors != members:
            self.fail(f"{host.name} staged {lane} {seq} of {contributors}, the members are {members}")
        self._staged.setdefault((self._key(host, lane, seq, epoch), epoch), set()).add(host.core.member)

    def completed(self, host: "Host", lane: str, seq: int, epoch: int) -> None:
        """A member takes an operation for complete by its confirmations."""
        if self._promised.get(host, 0) > epoch:
            self.fail(f"{host.name} completes {lane} {seq} of epoch {epoch} and promised {self._promised[host]}")
        self._check_staged(host, self._key(host, lane, seq, epoch), epoch)

    def _check_staged(self, host: "Host", key: Key, epoch: int) -> None:
        members, staged = self._members(key[1], epoch), self._staged.get((key, epoch), _NOBODY)
        if members <= staged:
            return
        missing = members - staged
        if host.core.member in missing or missing.difference(self._lost):
            self.fail(f"{host.name} completes {key} of epoch {epoch}; members {sorted(missing)} have not staged it")

    def returned(self, host: "Host", lane: str, seq: int, epoch: int) -> None:
        """A member returned the result of the attempt of `epoch`."""
        key = self._key(host, lane, seq, epoch)
        if self.tracing:
            self.world.say(f"{host.name} returns {lane} {seq} of epoch {epoch}")
        self._check_staged(host, key, epoch)
        for other, done in self._returned.setdefault(key, {}).items():
            if done != epoch:
                self.fail(f"{host.name} returns {key} of epoch {epoch}, {other.name} that of {done}")
        if self._newest_attempt.get(key, 0) > epoch:
            self.fail(f"{host.name} returns {key} of epoch {epoch}; it was run again in {self._newest_attempt[key]}")
        self._returned[key][host] = epoch

    def raised(self, host: "Host", lane: str, seq: int, error: RingholdError) -> None:
        """A member raised an error that every survivor must raise."""
        kind = type(error).__name__
        self.count(f"raised {kind}")
        self.world.say(f"{host.name} raises {kind} at {lane} {seq}: {error}")
        self._raised.setdefault(self._key(host, lane, seq, host.core.epoch), {})[host] = error
        if kind == "DescriptorMismatch" and not self.deviates:
            self.fail(f"{host.name} raises {kind} at {lane} {seq}; everybody called the same")
        if kind == "CrossedWaits" and not self.world.history.crosses:
            self.fail(f"{host.name} raises {kind} at {lane} {seq}; nobody crossed")
        lost = self._lost.intersection(self.groups.get(lane, self._lost))
        if kind == "MemberLost" and not lost and not self.deviates:
            self.fail(f"{host.name} raises {kind} at {lane} {seq}; nobody of its group was lost")

    def ended(self, host: "Host", how: str) -> None:
        """A host's program ended."""
        self.count(f"ended {how}")
        options = self.world.history.options
        if how == "QuorumLost" and not options.quorum and options.min_members == 1:
            self.fail(f"{host.name} ends with {how} without a quorum")
        if how not in ("done", "left", "dead", "Evicted", "QuorumLost", "CoordinatorUnreachable"):
            self.fail(f"{host.name} ends with {how}")

    def finish(self) -> None:
        """Everything has come to its end: do the survivors agree?"""
        survivors = {host for host in self.world.hosts if host.finished == "done"}
        for key, errors in self._raised.items():
            here = {host: type(error).__name__ for host, error in errors.items() if host in survivors}
            done = [host for host in self._returned.get(key, {}) if host in survivors]
            if (here and done) or len(set(here.values())) > 1:
                told = ", ".join(f"{host.name}: {kind}" for host, kind in here.items())
                self.fail(f"{key} ended with {told}, and returned on {[host.name for host in done]}")
        if self.world.history.theme in ("calm", "silence"):
            for host in self.world.hosts:
                if host.finished not in ("done", "left", "QuorumLost", "") and not host.suspect:
                    self.fail(f"{host.name} ended with {host.finished}, and nothing was wrong")
        headquarters = self.world.headquarters
        coordinator = headquarters.coordinator
        if coordinator is not None and not headquarters.outdated and coordinator.highest < self._latest:
            self.fail(f"the coordinator's highest number is {coordinator.highest}, after {self._latest}")
