"""The communicator: collectives among members that come and go. What users of the package call.

    comm = Communicator.join(coordinator="127.0.0.1:29400", run="exp1")
    outcome = comm.all_reduce(tensor, op="avg")
    comm.leave()

A collective ends with the same bits on every surviving member, or with an error on every survivor and its inputs
untouched. The outcome names the members whose data are in it.
"""

import atexit
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from collectives.arrangement import PROBE_BYTES, Arrangement, Measurement, arrange, measure
from collectives.calls import Collectives
from collectives.epochs import Epochs
from collectives.errors import (
    CorruptChunk,
    LaneMisuse,
    MemberLost,
    RingholdError,
    UsageError,
)
from collectives.group import Alone, Group, Runner
from collectives.lanes import Lane, Lanes, check_name
from collectives.membership.member import MAIN
from collectives.membership.protocol import Decision
from collectives.membership.session import Event, Session
from collectives.membership.wire import load_token, parse_address
from collectives.operations import Call, View
from collectives.options import Options
from collectives.outcome import Outcome, Work
from collectives.point_to_point import PointToPoint
from collectives.step import Step
from collectives.subgroup import SubGroup, check_members, name_of
from collectives.sync import SyncReport, sync
from collectives.trace import Trace
from collectives.transports.metered import Meter


class Communicator(Collectives, PointToPoint):
    """A member's access to its group. Make one with `join` or `solo`; a context manager that leaves at the end.

    The operations are those of `Collectives`, among all members, and `send` and `recv`; `group` gives the collectives
    among some.
    """

    def __init__(self, runner: Runner, session: Session | None, epochs: Epochs | None) -> None:
        self._runner = runner
        self._session, self._epochs = session, epochs
        self._lanes = Lanes(self._execute, runner.view)
        self._groups: dict[str, tuple[int, ...]] = {}
        self._step: Step | None = None
        self._synced = False
        self._astray = False
        self._observers: list[Callable[[Event], None]] = []
        self._closed = False

    # --- coming and going ---

    @classmethod
    def join(
        cls,
        coordinator: str = "",
        run: str = "default",
        token: str | None = None,
        transport: str = "gloo",
        options: Mapping[str, Any] | Options | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Self:
        """Join a run; returns as a member of an epoch, when its transport is ready.

        Args:
            coordinator: HOST:PORT; empty: RINGHOLD_COORDINATOR.
            run: name of the run, the same for the coordinator and all members.
            token: the shared secret; None: RINGHOLD_TOKEN, else the file that RINGHOLD_TOKEN_FILE names.
            transport: "gloo" (torch's gloo carries the bulk; "gloo:4": over four connections a pair), "sockets" (our
                own links do: Unix-domain sockets within a host, TCP between), "shm" (members of one host read each
                other's memory) or "mpi"; the same for all members. "checked:" before one of the first two gives tensor
                data checksums, "emulated:" before all of it shapes the links as the topology of the options says.
            options: see `Options`.
            on_event: as `on_event`, from the start.

        Raises:
            JoinRefused: wrong token, another run, another version, another transport.
            CoordinatorUnreachable: no coordinator there, or no place in an epoch, within `join_timeout`.
            Evicted: it was let in, and taken for dead before its first epoch stood.
            UsageError: no token, a malformed address, an unknown option or transport.

        """
        chosen = options if isinstance(options, Options) else Options.resolve(options)
        address = parse_address(coordinator)
        secret = load_token(token)
        epochs = Epochs(
            transport,
            run,
            secret,
            chosen,
            on_ready=lambda epoch: comm._ready(epoch),
            on_failure=lambda epoch, peer: comm._link_failed(epoch, peer),
            on_refusal=lambda: comm._wake(),
        )
        try:
            session = Session(
                address,
                run,
                secret,
                chosen,
                transport,
                epochs.address,
                on_fence=epochs.fence,
                on_decision=lambda decision: comm._decided(decision),
                on_event=lambda event: comm._tell(event),
            )
        except BaseException:
            epochs.close()
            raise
        group = Group(session, epochs, chosen.check_inputs, lambda epoch: comm._recovered(epoch))
        comm = cls(group, session, epochs)
        _open.add(comm)
        if on_event is not None:
            comm.on_event(on_event)
        session.start()
        try:
            session.await_first_epoch(chosen.join_timeout, lambda epoch: epochs.transport(epoch) is not None)
            if chosen.trace:
                group.trace = Trace(chosen.trace, run, session.core.member)
                comm.on_event(group.trace.event)
        except BaseException:
            comm.close()
            raise
        return comm

    @classmethod
    def solo(cls) -> Self:
        """Return a communicator of one member and no network, so that code needs no `if distributed`."""
        return cls(Alone(), None, None)

    def leave(self) -> None:
        """Leave the run, with notice, and free everything. Operations under way end with `Evicted`."""
        if self._session is not None and not self._closed:
            core, changed = self._session.core, self._session.changed
            with changed:
                if core.error is None:
                    self._session.post(core.leave("leave() was called"))
                    changed.wait_for(lambda: core.error is not None, timeout=2.0)
        self.close()

    def close(self) -> None:
        """Free everything; the others see a loss unless `leave` was called before. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._session is not None and self._epochs is not None:
            self._session.close()
            self._session.fail(UsageError("this communicator was closed; join again"))
            self._epochs.close()
        self._lanes.close()
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # --- who is here ---

    @property
    def rank(self) -> int:
        """This member's place among `members`."""
        return self._lane(MAIN).view.rank

    @property
    def size(self) -> int:
        """World size."""
        return self._lane(MAIN).view.size

    @property
    def members(self) -> tuple[int, ...]:
        """Ids of the members by rank. Changes only when a call returns (rule R5)."""
        return self._lane(MAIN).view.members

    @property
    def epoch(self) -> int:
        """Number of the epoch that `rank` and `size` belong to."""
        return self._lane(MAIN).view.epoch

    @property
    def member_id(self) -> int:
        """Number of this member, never used again in the run."""
        return self.members[self.rank]

    @property
    def founder(self) -> bool:
        """Whether this member was there when the run began; it may vote in `sync` from the start."""
        if self._session is None:
            return True
        decision = self._session.core.decision
        return decision is not None and any(i.founder for i in decision.members if i.member == self.member_id)

    @property
    def meter(self) -> Meter:
        """Counts the bytes of payload that operations have sent from here, as exactly as schedules say them."""
        return self._runner.meter

    def on_event(self, observer: Callable[[Event], None]) -> None:
        """Call `observer` with a dict when the membership changes: fenced, epoch, ready, recovered, evicted.

        Each has "event" and "time" (seconds since 1970) and "epoch" where there is one. Calls come from other
        threads and must not block.
        """
        self._observers.append(observer)

    # --- some of the members ---

    def group(self, members: Sequence[int], name: str = "") -> SubGroup:
        """Return the collectives among these members only: they fail and recover apart from all others.

        Each of them calls it with the same members in the same order; nothing is sent. A member that is admitted later
        is in no sub-group that was there before.

        Args:
            members: ids of members, this one's too; their order is that of the ranks.
            name: the same on all; it stands for one list of members as long as this communicator lives. Members that
                mean different ones by it get `DescriptorMismatch` from its operations, for good. Empty: the list.

        Raises:
            UsageError: a member is named twice or is no member, this one is not named, or `name` stands for others.

        """
        chosen = check_members(members, self.member_id, self._here())
        if name:
            check_name("sub-group", name)
        name = name or name_of(chosen)
        if self._groups.setdefault(name, chosen) != chosen:
            raise UsageError(f"sub-group {name!r} is {list(self._groups[name])}, not {list(chosen)}; take another name")
        return SubGroup(name, chosen, self._lanes)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized tensor for data that are often reduced: gradients, buckets.

        With transport "shm" it lies in registered memory: peers map it, and reductions read it where it is.
        """
        arena = None if self._epochs is None else self._epochs.arena
        if arena is None:
            return torch.empty(shape, dtype=dtype)
        return arena.empty(math.prod(shape), dtype).view(shape)

    # --- membership at safe points ---

    def admit(self) -> bool:
        """Let waiting peers in, at a point where every member calls this and all its lanes are idle (rule R13).

        Lanes of sub-groups, and of messages, are among these.

        Where nobody waits it is one small all-reduce. True: the membership changed, on every member alike; the new
        ones' first call is `sync`, so the others call it now.

        Raises:
            LaneMisuse: an operation is under way on some lane.

        """
        self._refuse_if_busy("admit")
        session = self._session
        if session is None:
            return False
        bit = torch.tensor([session.waiting > 0], dtype=torch.int32)
        self.all_reduce(bit, "max")
        if not bit.item():
            return False
        before = self.members
        try:
            session.await_admission()
        except KeyboardInterrupt:
            session.depart("KeyboardInterrupt inside admit")  # the others count on us at the safe point
            raise
        for lane in self._lanes:
            lane.refresh()
        return self.members != before

    def spawn(self, command: Sequence[str], count: int = 1, environ: Mapping[str, str] | None = None) -> None:
        """Start more ranks of this MPI job: over transport "mpi" nobody else can join. One member calls it.

        The new processes run `command`, which calls `join`; they come in at a later `admit`. `environ`, values without
        line breaks, is added to the environment that mpirun gave the first ranks.

        Raises:
            SpawnFailed: they could not be started, or did not join in time.
            Unsupported: the transport is another one, or the library is not Open MPI.

        """
        if self._session is None or self._epochs is None:
            raise UsageError("a communicator of one member has no MPI job; join a run over transport mpi")
        if not command or count < 1 or any("\n" in value for value in (environ or {}).values()):
            raise UsageError("spawn needs a command, a count of 1 or more, and an environment without line breaks")
        self._epochs.spawn(command, environ or {}, count)

    def sync(self, state: dict[Any, Any]) -> SyncReport:
        """Bring `state` to the same bits on every member, those of the healed majority; see `collectives.sync.sync`."""
        may_vote = (self.founder or self._synced) and not self._astray
        try:
            report = sync(self, state, voter=may_vote, synced=self._synced)
        except CorruptChunk:
            self._astray = True  # the state may be a mixture now
            raise
        self._synced, self._astray = True, False
        return report

    # --- where they are ---

    def measure(self, nbytes: int = PROBE_BYTES) -> Measurement:
        """Measure latency and bandwidth between all members, with messages of up to `nbytes`; every member calls it.

        All get the same numbers. It takes as many rounds as there are members, each of a few messages between two.
        """
        address = "" if self._epochs is None else self._epochs.address[0]
        return measure(self, address, nbytes)

    def optimize(self, nbytes: int = PROBE_BYTES) -> Arrangement:
        """Measure, and arrange later operations by it, where every member calls this and all its lanes are idle.

        Rings visit the members in the order whose slowest link is fastest; members that are near to each other count as
        a host, for hierarchical algorithms. Survivors of a loss keep it; a new member puts everybody back to the order
        of ranks, until this is called again. What is summed in another order may differ in the last bits.

        Raises:
            LaneMisuse: an operation is under way on some lane.

        """
        self._refuse_if_busy("optimize")
        found = arrange(self.measure(nbytes))
        self._runner.arrangement = found
        for lane in self._lanes:
            lane.refresh()
        return found

    def step(self) -> Step:
        """Return a context for one training step (rule R15); see `Step`."""
        self._step = Step(self)
        return self._step

    def resume(self, lane: str = MAIN) -> None:
        """Go on after a `MemberLost` of an operation with `on_loss="raise"`: the lane takes operations again."""
        self._lane(lane).resume()

    def resume_all(self) -> None:
        """`resume` every lane, those of sub-groups too; the end of a step does."""
        for lane in self._lanes:
            lane.resume()

    # --- inside ---

    def _refuse_if_busy(self, what: str) -> None:
        """Raise `LaneMisuse` where an operation is under way."""
        busy = sorted(lane.name for lane in self._lanes if not lane.idle)
        if busy:
            raise LaneMisuse(f"{what}() needs every lane idle; wait for the operations on {', '.join(busy)} first")

    def _start(self, call: Call, async_op: bool) -> Outcome | Work:
        return self._lanes.start(self._lane(call.lane), call, async_op)

    def _view(self, lane: str) -> View:
        return self._lane(lane).view

    def _execute(self, call: Call) -> Outcome:
        group = self._lanes.lane(call.lane).group
        try:
            outcome = call.run(self._runner.execute)
        except MemberLost as error:
            if self._step is not None:
                self._step.saw(error, group)
            raise
        except RingholdError:
            raise
        except BaseException as error:
            if self._session is not None:  # perhaps between two operations of the call: the others count on us (R4)
                self._session.depart(f"{type(error).__name__} inside {call.kind} on lane {call.lane!r}")
            raise
        if self._step is not None:
            self._step.saw(outcome, group)
        return outcome

    def _lane(self, name: str) -> Lane:
        check_name("lane", name)
        return self._lanes.lane(name)

    def _pair_lane(self, name: str, pair: tuple[int, int]) -> Lane:
        known = {*self._here(), *self._lost_members()}
        if strangers := [member for member in pair if member not in known]:
            raise UsageError(f"{strangers} are no members; the members are {list(self.members)} (ids, not ranks)")
        return self._lanes.lane(name, pair)

    def _lost_members(self) -> frozenset[int]:
        return frozenset() if self._session is None else self._session.core.lost

    def _here(self) -> tuple[int, ...]:
        """Ids of the members that the caller sees, and of those that it does not see yet."""
        now = () if self._session is None else self._session.core.members
        return tuple(dict.fromkeys(self.members + now))

    def _decided(self, decision: Decision) -> None:
        assert self._session is not None
        assert self._epochs is not None
        self._epochs.advance(decision, self._session.core.member)

    def _ready(self, epoch: int) -> None:
        self._wake()
        self._tell({"event": "ready", "time": time.time(), "epoch": epoch})

    def _wake(self) -> None:
        assert self._session is not None
        with self._session.changed:
            self._session.changed.notify_all()

    def _link_failed(self, epoch: int, peer: int) -> None:
        assert self._session is not None
        with self._session.changed:
            core = self._session.core
            self._session.post(core.link_down(epoch, peer or core.member))

    def _recovered(self, epoch: int) -> None:
        self._tell({"event": "recovered", "time": time.time(), "epoch": epoch})

    def _tell(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)


_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    """Close what is still open at the end of a process: a thread that is inside gloo then would end it by SIGABRT."""
    for comm in list(_open):
        comm.close()
