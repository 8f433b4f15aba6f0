"""The coordinator's half of the membership protocol, as a pure state machine.

It acts when membership changes and carries no tensor data. Events come in by method calls with the time as a number,
actions go out as a list whose order matters: a `Persist` is durable before anything behind it is done (rule R3).
`server.py` drives it with sockets, a clock and the journal; the simulation in the tests with none of them.
"""

from collections.abc import Callable, Sequence

from collectives.membership.actions import Action, Close, Connection, Persist, Send, Stop
from collectives.membership.claims import Claims
from collectives.membership.decisions import decide, members_of, nobody, part_of, verdict_on
from collectives.membership.protocol import (
    Admit,
    Alive,
    Beat,
    Decision,
    Differs,
    Evict,
    FromCoordinator,
    FromPeer,
    Inspect,
    Join,
    Leave,
    LinkDown,
    MemberInfo,
    Opened,
    Prepare,
    Prepared,
    Record,
    Refused,
    Report,
    Resume,
    Stalled,
    Status,
    Verdict,
    Waiting,
    Welcome,
)
from collectives.membership.roster import Change, Peer, rows_for_people
from collectives.membership.stalls import Complaints
from collectives.options import Options

__all__ = ["Action", "Close", "Coordinator", "Persist", "Send", "Stop"]


class Coordinator:
    """State of one run's membership.

    `digest` turns a member's secret into its public nonce, `fresh_nonce` names epochs; both are given so that a
    simulation is repeatable.
    """

    def __init__(
        self,
        run: str,
        options: Options,
        records: Sequence[Record],
        now: float,
        digest: Callable[[bytes], bytes],
        fresh_nonce: Callable[[], bytes],
    ) -> None:
        self.run = run
        self.options = options
        self._digest = digest
        self._fresh_nonce = fresh_nonce
        self.peers: dict[int, Peer] = {}
        self.decision: Decision | None = None
        self._listed: tuple[int, ...] = ()
        """Members of the last decided epoch, in rank order."""
        self.change: Change | None = None
        self.highest = 0
        self._next_member = 1
        self._safe: set[int] = set()
        self._verdicts: dict[tuple[str, int], Verdict] = {}
        self._complaints = Complaints(options)
        self._claims = Claims()
        self._left: set[int] = set()
        self._connections: dict[Connection, int] = {}
        self._announced_waiting = 0
        self._ticked = now
        self._grace = now
        self._heard = now
        self._restore(records, now)

    # --- views ---

    @property
    def members(self) -> tuple[int, ...]:
        """Members of the last decided epoch that are still taken for alive, in rank order."""
        peers = self.peers
        return tuple([member for member in self._listed if member in peers])

    @property
    def waiting(self) -> tuple[int, ...]:
        """Peers that wait for a place, in order of arrival."""
        listed = self._listed
        return tuple([member for member in self.peers if member not in listed])

    def status(self, now: float) -> Status:
        """Tell people what is going on."""
        epoch = self.decision.epoch if self.decision else 0
        rows = rows_for_people(self.peers, self.members, self.change, self._safe, now)
        return Status(self.run, epoch, self.change.epoch if self.change else 0, len(self.waiting), rows)

    # --- events ---

    def on_message(self, connection: Connection, message: FromPeer, now: float) -> list[Action]:
        """Handle one message of an authenticated connection."""
        if isinstance(message, Inspect):
            return [Send(connection, self.status(now))]
        self._heard = now
        member = self._connections.get(connection)
        if isinstance(message, Join | Resume):
            if member is not None:
                return [Send(connection, Refused("this connection has joined already")), Close(connection)]
            if isinstance(message, Join):
                return self._join(connection, message, now)
            return self._resume(connection, message, now)
        if member is None:
            return [Send(connection, Refused("say Join or Resume first")), Close(connection)]
        peer = self.peers[member]
        peer.heard = now
        match message:
            case Beat():
                peer.lanes, peer.beaten = message.lanes, now
                return [Send(connection, Alive()), *self._beaten(member, message)]
            case Report():
                return self._reported(member, message)
            case Admit():
                return self._at_safe_point(member, message)
            case LinkDown():
                return self._complain(member, message, now)
            case Differs():
                return self._differs(member, message)
            case Stalled():
                return self._complain(member, message, now)
            case Leave():
                self._left.add(member)
                return self._lose([member], message.reason)
            case _:
                return [Send(connection, Refused(f"unexpected {type(message).__name__}")), Close(connection)]

    def on_closed(self, connection: Connection, now: float) -> list[Action]:
        """Handle the end of a connection: the kernel closes a dead process' sockets, so its peer is lost at once."""
        member = self._connections.pop(connection, None)
        if member is None:
            return []  # a stranger's, or one that was replaced
        self._notice_gap(now)
        if now < self._grace and member in self.members:
            # It gave us up while we slept; it will be back.
            self.peers[member].connection = None
            return []
        return self._lose([member], "its connection to the coordinator closed")

    def on_tick(self, now: float) -> list[Action]:
        """Look at the deadlines; call it several times per heartbeat."""
        self._notice_gap(now)
        self._ticked = now
        limit = self.options.heartbeat_timeout
        if self.peers and now - self._heard > limit / 2:
            # Everybody is silent at once: more likely our own network than all of them. Nobody is evicted. Their last
            # beats were up to a heartbeat apart, so it must be seen before the first of them has used up its time.
            self._wait_for_all(now)
        silent = [m for m, peer in self.peers.items() if now - peer.heard > limit]
        actions = self._lose(silent, f"silent for more than {limit:g} s") if silent else []
        return actions + self._remedy(now)

    def _notice_gap(self, now: float) -> None:
        """Rule R12: after a gap in our own loop the silence is ours, not theirs."""
        if now - self._ticked > self.options.heartbeat_timeout / 2:
            self._ticked = now
            self._wait_for_all(now)

    def _wait_for_all(self, now: float) -> None:
        """Give everybody a whole timeout, in which a connection may also close and come back: they gave us up."""
        self._grace = now + self.options.heartbeat_timeout
        for peer in self.peers.values():
            peer.heard = now

    # --- joining ---

    def _join(self, connection: Connection, message: Join, now: float) -> list[Action]:
        transport = self._transport()
        if transport and transport != message.transport:
            reason = f"this run uses transport {transport!r}, the peer wants {message.transport!r}"
            return [Send(connection, Refused(reason)), Close(connection)]
        member = self._next_member
        self._next_member += 1
        info = MemberInfo(member, message.nonce, message.host, message.port, False)
        self.peers[member] = Peer(info, message.transport, connection, now)
        self._connections[connection] = member
        return [Send(connection, Welcome(member)), *self._consider()]

    def _resume(self, connection: Connection, message: Resume, now: float) -> list[Action]:
        known = self.decision.epoch if self.decision else 0
        if message.epoch > known or message.promised > self.highest:
            return [self._stale(message)]
        peer = self.peers.get(message.member)
        if peer is None or self._digest(message.secret) != peer.info.nonce:
            reason = f"member {message.member} was taken for dead and is no longer part of run {self.run!r}; join again"
            return [Send(connection, Evict("evicted", reason)), Close(connection)]
        actions: list[Action] = []
        if peer.connection is not None:
            self._connections.pop(peer.connection, None)
            actions.append(Close(peer.connection))
        peer.connection, peer.heard = connection, now
        self._connections[connection] = message.member
        if self.decision is not None and message.epoch < known and message.member in self.members:
            actions.append(Send(connection, part_of(self.decision, message.member)))
        actions.append(Send(connection, Waiting(len(self.waiting))))
        if self.change and message.member in self.change.members:
            return [*actions, Send(connection, Prepare(self.change.epoch, list(self.change.members)))]
        if message.promised > known and self.change is None and message.member in self.members:
            # It fenced for a change that died with the last coordinator: only a new one frees it.
            return actions + self._begin()
        return actions

    def _stale(self, message: Resume) -> Stop:
        return Stop(
            f"member {message.member} has seen epoch {max(message.epoch, message.promised)}, the journal ends at "
            f"{self.highest}: this journal is old; start the coordinator on the newest one"
        )

    def _transport(self) -> str:
        """Name of the transport of the run: the epoch's, else that of the first peer that waits."""
        for member in (*self.members, *self.waiting):
            return self.peers[member].transport
        return ""

    # --- changes (rule R3) ---

    def _consider(self) -> list[Action]:
        """Begin a change if one is due, else tell the members how many peers wait."""
        if self.change is not None:
            return self._tell_waiting()
        members, waiting = self.members, self.waiting
        if members:
            return self._begin() if self._safe.issuperset(members) else self._tell_waiting()
        founding = self.decision is None or self.decision.ended
        if waiting and len(waiting) >= (self.options.founders if founding else self.options.min_members):
            return self._begin()
        return []

    def _begin(self) -> list[Action]:
        """Start a change with those who are alive; its number was never used."""
        members = self.members
        joiners = self.waiting if not members or self._safe.issuperset(members) else ()
        listed = members + joiners
        if short := self._too_few(len(members), len(listed)):
            return self._dissolve(short)
        self.highest += 1
        self.change = Change(self.highest, listed)
        prepare = Prepare(self.highest, list(listed))
        return [Persist(Prepared(self.highest)), *self._broadcast(listed, prepare)]

    def _too_few(self, survivors: int, listed: int) -> str:
        if self.decision is None or not self.decision.members:
            return ""
        before = len(self.decision.members)
        if self.options.quorum and 2 * survivors <= before:
            return f"{survivors} of {before} members are left and `quorum` asks for more than half"
        if listed < self.options.min_members:
            return f"{listed} members are left and `min_members` is {self.options.min_members}"
        return ""

    def _dissolve(self, reason: str) -> list[Action]:
        """Refuse to go on: every member is told; whoever joins next has no state to go on from."""
        members = self.members
        actions: list[Action] = []
        for member in members:
            connection = self.peers[member].connection
            if connection is not None:
                actions += [Send(connection, Evict("quorum", reason)), Close(connection)]
            self._forget(member)
        return self._empty(ended=False) + actions + self._consider()

    def _reported(self, member: int, report: Report) -> list[Action]:
        change = self.change
        if change is None or report.epoch != change.epoch or member not in change.members:
            return []
        change.reports[member] = report
        if len(change.reports) < len(change.members):
            return []
        return self._decide(change)

    def _decide(self, change: Change) -> list[Action]:
        decision = decide(
            self.decision,
            change,
            [self.peers[member].info for member in change.members],
            self._verdicts.values(),
            self._safe,
            nonce=self._fresh_nonce(),
            next_member=self._next_member,
            transport=self._transport(),
        )
        for info in decision.members:
            self.peers[info.member].info = info
        self._settle(decision)
        announce = [s for m in change.members for s in self._broadcast((m,), part_of(decision, m))]
        return [Persist(decision), *announce, *self._consider()]

    def _settle(self, decision: Decision) -> None:
        self.decision, self.change = decision, None
        self._listed = members_of(decision)
        self._safe.clear()
        self._verdicts.clear()
        self._complaints.clear()
        self._claims.settle(decision.verdicts)
        self._left.clear()
        self._announced_waiting = 0

    def _lose(self, members: Sequence[int], why: str) -> list[Action]:
        """Take these peers for dead; a change under way starts again without them under a new number.

        They are told behind what follows from it: that the last member left must be on disk before it goes.
        """
        present = set(self.members)
        farewells: list[Action] = []
        for member in members:
            connection = self.peers[member].connection
            if connection is not None:
                farewells += [Send(connection, self._farewell(member, why)), Close(connection)]
            self._forget(member)
        if present and not self.members:
            return self._empty(ended=self._left.issuperset(present)) + self._consider() + farewells
        if present.intersection(members) or (self.change and set(self.change.members).intersection(members)):
            self.change = None
            # Only joiners of a founding may be gone, then nobody is left to begin with.
            return (self._begin() if self.members else self._consider()) + farewells
        return self._consider() + farewells

    def _farewell(self, member: int, why: str) -> Evict:
        if member in self._left:
            return Evict("left", f"member {member} left: {why}")
        return Evict("evicted", f"member {member} was taken for dead: {why}; join again")

    def _forget(self, member: int) -> None:
        peer = self.peers.pop(member)
        self._safe.discard(member)
        if peer.connection is not None:
            self._connections.pop(peer.connection, None)

    def _empty(self, ended: bool) -> list[Action]:
        """Nobody is left; journal it, so that a restart does not wait for the dead."""
        self.highest += 1
        decision = nobody(self.decision, self.highest, self._fresh_nonce(), self._next_member, ended)
        self._settle(decision)
        return [Persist(decision)]

    # --- what members tell ---

    def _beaten(self, member: int, message: Beat) -> list[Action]:
        """Look whether a sub-group is disputed; what becomes of it follows from the reports of a change."""
        disputed = member in self.members and self._claims.disputed(message.lanes)
        return self._begin() if disputed and self.change is None else []

    def _at_safe_point(self, member: int, message: Admit) -> list[Action]:
        if self.decision is None or message.epoch != self.decision.epoch or member not in self.members:
            return []
        self._safe.add(member)
        return self._consider()

    def _differs(self, member: int, message: Differs) -> list[Action]:
        if self.decision is None or message.epoch != self.decision.epoch or member not in self.members:
            return []
        self._verdicts.setdefault((message.lane, message.seq), verdict_on(member, message))
        return [] if self.change else self._begin()

    def _complain(self, member: int, message: LinkDown | Stalled, now: float) -> list[Action]:
        """Take note; what follows from it is seen at the next tick."""
        if self.decision is not None and message.epoch == self.decision.epoch and member in self.members:
            if isinstance(message, LinkDown):
                self._complaints.link_down(member, message.peer, now)
            else:
                self._complaints.stalled(member, (message.lane, message.seq), now)
        return []

    def _remedy(self, now: float) -> list[Action]:
        """Rule R11: do something about what members complain of, if a change does not do so anyway."""
        if self.change or not self._complaints:
            return []
        members = {m: self.peers[m] for m in self.members}
        rows = {m: {status.lane: status for status in peer.lanes} for m, peer in members.items()}
        remedy = self._complaints.judge(rows, min(peer.beaten for peer in members.values()), now)
        if remedy is None:
            return []
        evict = [member for member in remedy.evict if member in members]
        if evict:
            return self._lose(evict, remedy.why)
        self._verdicts.update({(v.lane, v.seq): v for v in remedy.verdicts})
        return self._begin()

    def _tell_waiting(self) -> list[Action]:
        waiting = len(self.waiting)
        if waiting == self._announced_waiting:
            return []
        self._announced_waiting = waiting
        return self._broadcast(self.members, Waiting(waiting))

    def _broadcast(self, members: Sequence[int], message: FromCoordinator) -> list[Action]:
        connections = (self.peers[m].connection for m in members)
        return [Send(c, message) for c in connections if c is not None]

    def _restore(self, records: Sequence[Record], now: float) -> None:
        """Read the journal (rule R12): numbers never go back, the last decision stands, everybody gets time."""
        for record in records:
            if not isinstance(record, Opened):
                self.highest = max(self.highest, record.epoch)
            if isinstance(record, Decision):
                self.decision, self._listed = record, members_of(record)
                self._next_member = record.next_member
        if self.decision is not None:
            for info in self.decision.members:
                self.peers[info.member] = Peer(info, self.decision.transport, None, now)
