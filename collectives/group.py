"""Runs operations: headers, engine, confirmation, and what becomes of them when the membership changes.

`Group` does it among the members of a run; `Alone` is the same interface for one member and no network. The verdict on
an attempt that fails is the membership's alone (rules R2 to R4); this module obeys it.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from collectives import descriptor, faults
from collectives.arrangement import Arrangement
from collectives.confirm import confirm
from collectives.descriptor import Descriptor
from collectives.engine import Engine
from collectives.epochs import Epochs
from collectives.errors import CrossedWaits, DescriptorMismatch, MemberLost, RingholdError, TransportLost, UsageError
from collectives.membership.claims import digest_of
from collectives.membership.member import Completed, Run, Wait
from collectives.membership.protocol import Differs
from collectives.membership.session import Session
from collectives.operations import Operation, Plan, View
from collectives.outcome import Outcome
from collectives.schedule import Schedule
from collectives.staging import StagingPool, anonymous
from collectives.state import state_hash
from collectives.trace import Trace, profiled
from collectives.transports.alone import NoTransport
from collectives.transports.base import Transport, channel_of
from collectives.transports.metered import Meter, MeteredTransport
from collectives.transports.part import PartTransport

log = logging.getLogger("ringhold.member")

MOST_VIEWS = 256
"""So many are remembered: two are asked for with every operation."""


class Runner(ABC):
    """Whoever runs operations for a communicator, one at a time on each lane.

    `trace` is told of every operation; None: nobody is.
    """

    trace: Trace | None = None
    meter: Meter
    """Counts what operations send."""
    arrangement: Arrangement | None = None
    """How members are arranged, where that was found out; set while no operation is under way, on all members alike."""

    @abstractmethod
    def view(self, lane: str, group: tuple[int, ...] = ()) -> View:
        """Return the ranks that the caller of this lane of a sub-group (empty: of all) sees (rule R5)."""

    @abstractmethod
    def execute(self, operation: Operation) -> Outcome:
        """Run one operation to its end, by result or by error."""

    def close(self) -> None:
        """Free what it keeps. No operation is under way, and none comes."""
        if self.trace is not None:
            self.trace.close()


class Alone(Runner):
    """One member, no network."""

    def __init__(self) -> None:
        self.meter = Meter()
        self._view = View(1, (1,), 0)
        self._pool = StagingPool()
        self._engine = Engine(self._pool)
        self._transport = NoTransport()
        self._seq: Counter[str] = Counter()

    def view(self, lane: str, group: tuple[int, ...] = ()) -> View:
        """Always the same."""
        return self._view

    def execute(self, operation: Operation) -> Outcome:
        """Run the schedule for a world of one: no step moves anything."""
        self._seq[operation.lane] += 1
        operation.seq = self._seq[operation.lane]
        plan = operation.plan(self._view)
        program = self._engine.program(plan.schedule, self._transport, plan.source.dtype, plan.dtype, plan.lift)
        staging = self._pool.take(program.footprint, plan.dtype)
        self._engine.run(plan.schedule, self._transport, 0, plan.source, staging, plan.op, plan.kernels, lift=plan.lift)
        result = operation.deliver(program.pieces(plan.source, staging), self._view)
        return Outcome(result, self._view.members, 1, 1, False)


@dataclass(slots=True)
class _Attempt:
    """The last attempt of an operation: for whom, how, its staging, and where in it (or in the input) the result is."""

    view: View
    plan: Plan
    staging: Tensor
    pieces: tuple[Tensor, ...]


class Group(Runner):
    """The members of a run, through the session and the transports of its epochs.

    Args:
        session: this member's place in the run; its condition is the engine lock.
        epochs: the transports.
        check_inputs: hash each input before and after the operation and complain if the caller changed it (rule R7).
        on_recovered: called with the epoch after its first complete operation, where it began with a loss.

    """

    def __init__(
        self, session: Session, epochs: Epochs, check_inputs: bool, on_recovered: Callable[[int], None]
    ) -> None:
        self.meter = Meter()
        self._session = session
        self._epochs = epochs
        self._check_inputs = check_inputs
        self._on_recovered = on_recovered
        arena = epochs.arena
        self._pool = StagingPool(anonymous if arena is None else arena.allocate)
        self._engine = Engine(self._pool)
        self._recovered = 0
        self._channels: dict[int, str] = {}
        self._views: dict[tuple[int, tuple[int, ...]], tuple[Arrangement | None, View]] = {}

    def close(self) -> None:
        """See Runner. The last error may keep this object alive for long; the memory need not wait for that."""
        Runner.close(self)
        self._pool.close()

    def view(self, lane: str, group: tuple[int, ...] = ()) -> View:
        """Return the ranks of the attempt that completed the lane's last operation."""
        with self._session.changed:
            return self._view_of(lane, self._session.core.lane(lane, group).view)

    def execute(self, operation: Operation) -> Outcome:
        """Run one operation to its end.

        Raises:
            MemberLost, DescriptorMismatch, CrossedWaits: on every survivor alike; inputs untouched.
            Evicted, QuorumLost, CoordinatorUnreachable: this member is out of the run.

        """
        core, changed = self._session.core, self._session.changed
        self._claim_channel(operation.lane)
        with changed:
            if core.error is not None:
                raise core.error
            seq = operation.seq = core.enter(operation.lane, operation.kind)
        try:
            with profiled(operation.kind):
                return self._settle(operation, seq)
        except (MemberLost, DescriptorMismatch, CrossedWaits):
            raise  # the verdict of all
        except BaseException as error:
            if not isinstance(error, RingholdError) or core.lanes[operation.lane].complete < seq:
                # Rule R4: whoever gives up inside an operation by itself has departed.
                self._session.depart(f"{type(error).__name__} inside {operation.kind} {seq} of lane {operation.lane!r}")
            raise
        finally:
            if self.trace is not None:
                self.trace.end(operation.lane)
            with changed:
                core.exit(operation.lane, seq)
                core.forget()

    def _settle(self, operation: Operation, seq: int) -> Outcome:
        """Attempt until the membership's verdict is final."""
        attempts, last = 0, None
        before = self._fingerprint(operation)
        probe = faults.probe(operation.kind, seq)
        if self.trace is not None:
            probe = self.trace.operation(operation, seq, probe)
        if probe:
            probe("enter")
        while True:
            verdict = self._verdict(operation.lane, seq)
            if isinstance(verdict, RingholdError):
                last = None  # the error, which may live for long, would keep it
                raise verdict
            if isinstance(verdict, Completed):
                assert last is not None
                assert last.view.epoch == verdict.epoch
                break
            view, transport = verdict
            last = None  # free the staging of the attempt before
            self._refuse_if_lost(operation, seq, view, transport)
            if self.trace is not None:
                transport = self.trace.attempt(operation.lane, seq, view, transport)
            attempts += 1
            try:
                last = self._prepare(operation, view, transport)
                self._attempt(operation, seq, last, transport, probe)
            except TransportLost as error:
                self._interrupted(operation.lane, view.epoch, error)
            else:
                break
        if self._fingerprint(operation) != before:
            raise UsageError(f"the input of {operation.kind} {seq} was changed while the operation was under way")
        if probe:
            probe("confirmed")
        result = operation.deliver(last.pieces, last.view)
        if probe:
            probe("copied")
        if last.view.epoch != self._recovered:
            self._recovered = last.view.epoch
            self._on_recovered(last.view.epoch)
        return Outcome(result, last.view.members, last.view.epoch, attempts, isinstance(verdict, Completed))

    def _prepare(self, operation: Operation, view: View, transport: Transport) -> _Attempt:
        """Plan an attempt and take the staging that it needs."""
        plan = operation.plan(view)
        program = self._engine.program(plan.schedule, transport, plan.source.dtype, plan.dtype, plan.lift)
        staging = self._pool.take(program.footprint, plan.dtype)
        return _Attempt(view, plan, staging, program.pieces(plan.source, staging))

    def _interrupted(self, lane: str, epoch: int, error: TransportLost) -> None:
        """An attempt failed on the link to the member of a rank in the whole epoch, or was aborted from here."""
        rank = error.peer
        core = self._session.core
        if rank is not None:
            log.info("epoch %d, lane %r: %s", epoch, lane, error)
        with self._session.changed:
            if core.epoch == epoch:
                peer = 0 if rank is None else core.members[rank]
                self._session.post(core.interrupt(lane, epoch, peer))

    def _fingerprint(self, operation: Operation) -> str:
        """Hash the input in the debug mode of rule R7: the caller leaves it alone until the outcome."""
        return state_hash({"input": operation.input}) if self._check_inputs else ""

    def _verdict(self, lane: str, seq: int) -> RingholdError | Completed | tuple[View, Transport]:
        """Wait until it is clear what becomes of the operation; with Run also for the epoch's transport."""
        session = self._session
        with session.changed:
            while True:
                core = session.core
                verdict = core.verdict(lane, seq)
                if isinstance(verdict, Run):
                    transport = self._epochs.transport(verdict.epoch)
                    if transport is not None:
                        return self._part(lane, verdict.epoch, transport)
                elif not isinstance(verdict, Wait):
                    return verdict
                core.lanes[lane].phase, core.lanes[lane].waiting_for = "recovering", 0
                session.changed.wait()

    def _attempt(
        self,
        operation: Operation,
        seq: int,
        attempt: _Attempt,
        transport: Transport,
        probe: Callable[[str], None] | None,
    ) -> None:
        """One try in one epoch (rule R2): headers, data, staged, confirmed.

        Raises:
            TransportLost: it failed or the epoch is fenced; the membership knows what becomes of it.

        """
        core, changed = self._session.core, self._session.changed
        view, plan = attempt.view, attempt.plan
        channel = channel_of(operation.lane)

        def agree() -> None:
            if view.size > 1:
                self._agree(operation, seq, plan.schedule, view, transport, channel)
            core.lanes[operation.lane].phase = "moving"

        self._engine.run(
            plan.schedule,
            MeteredTransport(transport, self.meter, view.members),
            channel,
            plan.source,
            attempt.staging,
            plan.op,
            plan.kernels if self.trace is None else self.trace.kernels(operation.lane, plan.kernels),
            probe,
            plan.lift,
            agree,
        )
        with changed:
            if not core.stage(operation.lane, seq, view.epoch):
                raise TransportLost("the epoch was fenced before the result was staged")
        if probe:
            probe("staged")
        confirm(transport, channel, seq.to_bytes(8))
        with changed:
            if not core.complete(operation.lane, seq, view.epoch):
                raise TransportLost("the epoch was fenced before the result was confirmed")

    def _agree(
        self, operation: Operation, seq: int, schedule: Schedule, view: View, transport: Transport, channel: int
    ) -> None:
        """Rule R9: compare headers on every link in use, and around the ring always, before data is received."""
        mine = _describe(operation, seq, view)
        data = mine.encode()
        lane = self._session.core.lanes[operation.lane]
        senders, receivers = _partners(schedule, view.rank)
        for peer in receivers:
            transport.send_note(peer, data, channel)
        for peer in senders:
            lane.phase, lane.waiting_for = "waiting", view.members[peer]
            theirs = transport.recv_note(peer, channel)
            while theirs != data:
                other = descriptor.decode(theirs)
                if other.seq >= seq:
                    self._complain(mine, other, view.members[peer], view.members)
                # An older one: a member that saw a loss before we did told us that it does not take part.
                theirs = transport.recv_note(peer, channel)
        lane.waiting_for = 0

    def _complain(self, mine: Descriptor, theirs: Descriptor, other: int, members: tuple[int, ...]) -> None:
        """Report the difference and give the attempt up; the verdict reaches every member."""
        lost = mine.issued_apart(theirs, members) or theirs.seq > mine.seq
        message = Differs(mine.epoch, mine.lane, mine.seq, str(mine)[:2000], str(theirs)[:2000], other, lost)
        with self._session.changed:
            self._session.post(self._session.core.complain(message))
        raise TransportLost("a neighbour's header differs")

    def _refuse_if_lost(self, operation: Operation, seq: int, view: View, transport: Transport) -> None:
        """Rule R6: raise if members that the caller counted on are gone and the operation cannot do without them."""
        lost = tuple(m for m in operation.view.members if m not in view.members)
        if not lost or (operation.elastic and operation.root not in lost):
            return
        if view.size > 1:
            # Members that issued it after the loss must not wait for us. If this fails another change is under way,
            # which makes their view as old as ours.
            with suppress(TransportLost):
                data = _describe(operation, seq, view).encode()
                transport.send_note((view.rank + 1) % view.size, data, channel_of(operation.lane))
        names = ", ".join(map(str, lost))
        raise MemberLost(
            f"{operation.kind} {seq} of lane {operation.lane!r}: lost member {names}; {view.size} are left. Inputs are "
            "untouched: adapt to the new membership and call again",
            lost,
            view.members,
        )

    def _view_of(self, lane: str, epoch: int) -> View:
        core, arrangement = self._session.core, self.arrangement
        members = core.members_of(lane, epoch)
        known = self._views.get((epoch, members))
        if known is not None and known[0] is arrangement:
            return known[1]
        hosts, order = self._hosts(members, epoch), None
        if arrangement is not None:
            hosts, order = hosts or arrangement.hosts_of(members), arrangement.order_of(members)
        view = View(epoch, members, members.index(core.member), self._epochs.kind, hosts, order)
        if len(self._views) >= MOST_VIEWS:
            self._views.clear()
        self._views[epoch, members] = arrangement, view
        return view

    def _hosts(self, members: tuple[int, ...], epoch: int) -> tuple[int, ...] | None:
        """Number the members' hosts, if there are several. Of a past epoch they are not known, nor asked for."""
        decision = self._session.core.decision
        if decision is None or decision.epoch != epoch:
            return None
        addresses = {info.member: info.host for info in decision.members}
        numbers: dict[str, int] = {}
        hosts = tuple(numbers.setdefault(addresses[member], len(numbers)) for member in members)
        return hosts if len(numbers) > 1 else None

    def _part(self, lane: str, epoch: int, transport: Transport) -> tuple[View, Transport]:
        """Return the view of an attempt, and the transport among those that it names."""
        core, view = self._session.core, self._view_of(lane, epoch)
        if core.lanes[lane].group:
            ranks = {member: rank for rank, member in enumerate(core.past[epoch])}
            transport = PartTransport(transport, [ranks[member] for member in view.members])
        return view, transport

    def _claim_channel(self, lane: str) -> None:
        other = self._channels.setdefault(channel_of(lane), lane)
        if other != lane:
            raise UsageError(f"lanes {lane!r} and {other!r} cannot be used together; rename one of them")


def _describe(operation: Operation, seq: int, view: View) -> Descriptor:
    """Build the header of one attempt."""
    tensor = operation.tensor
    return Descriptor(
        epoch=view.epoch,
        lane=operation.lane,
        seq=seq,
        view=0 if operation.elastic else digest_of(operation.view.members),
        kind=operation.kind,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=operation.shape,
        op=operation.op,
        root=operation.root,
        algorithm=operation.label(view),
        on_loss=operation.on_loss,
    )


@lru_cache(maxsize=64)
def _partners(schedule: Schedule, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks whose headers this one reads, and ranks that it sends its own to; the ring neighbours come first."""
    steps = schedule.local(rank).steps
    before, behind = (rank - 1) % schedule.world, (rank + 1) % schedule.world
    senders = dict.fromkeys([before, *(recv.peer for step in steps for recv in step.recvs)])
    receivers = dict.fromkeys([behind, *(send.peer for step in steps for send in step.sends)])
    return tuple(senders), tuple(receivers)
