"""Carries a churn plan out on living processes and keeps what came of each fault. Part of `launch.supervisor`."""

import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.faults import FaultKind, Planned
from launch.record import FaultRecord, PeerRecord

if TYPE_CHECKING:
    from launch.supervisor import Supervisor

_KNOCK_TIMEOUT = 10.0
"""Seconds that a peer gets to reach the coordinator before the others stop holding for it."""
_STOPPED_LONGER = 1.5
"""A stopped peer sleeps for the heartbeat timeout plus this many seconds, so that it wakes evicted."""
_RETURNING: frozenset[FaultKind] = frozenset({"stop", "join", "coordinator"})


class Injector:
    """Strikes the planned faults in order, each when its step is reached and its victim is a working member."""

    def __init__(self, supervisor: "Supervisor", faults: Sequence[Planned]) -> None:
        self.faults = [FaultRecord(planned) for planned in faults]
        self._supervisor = supervisor
        self._pending = deque(self.faults)
        self._coordinator_fault: FaultRecord | None = None
        self._expected: dict[int, float] = {}
        """By fault: until when its peer is expected to knock at the coordinator's door; not there: it cannot yet."""
        self.opened = 0
        """Peers need not wait at gates up to this step."""

    def expects_revival(self) -> bool:
        """Whether a peer of ours that is down is yet to be brought back: then the run goes on without a living one."""
        return any(self.will_revive(slot) for slot in self._supervisor.spec.slots)

    def will_revive(self, slot: int) -> bool:
        """Whether a fault yet to come brings peer `slot` back."""
        return any(fault.planned.kind == "join" and fault.planned.slot == slot for fault in self._pending)

    @property
    def gates(self) -> list[int]:
        """Steps at which peers wait for `go`: those of faults, so that these strike at their very step, and the last.

        None under a launcher, where no supervisor speaks to all peers.
        """
        spec = self._supervisor.spec
        if spec.others is not None or not self.faults:
            return []
        return sorted({*(fault.planned.step for fault in self.faults), max(spec.steps - 1, 1)})

    def strike(self) -> None:
        """Inject every fault whose time has come, let peers that wait at a gate go on, warm up the next newcomer."""
        while self._is_due() and self._may_strike(self._pending[0].planned):
            self._inject(self._pending.popleft())
        self._open_gates()
        self._warm_up()

    def _is_due(self) -> bool:
        return bool(self._pending) and self._pending[0].planned.step <= self._supervisor.step

    def _open_gates(self) -> None:
        supervisor = self._supervisor
        passed = [gate for gate in self.gates if self.opened < gate <= supervisor.step]
        if passed and not self._holds():
            self.opened = passed[-1]
            for life in supervisor.lives.values():
                if life.state not in {"spare", "warm", "ended"}:
                    supervisor.children[life.name].send({"do": "go", "step": self.opened})

    def _holds(self) -> bool:
        """Whether peers at a gate stay there, because what they wait for comes to pass without them.

        A newcomer warms up and knocks at the door by itself; a member of the step that was just reported will report
        it too. Where a fault is due but its victim is away, and before the last step, everybody on the way back gets
        the time to knock. Then the gate has to open: it is the members that let others in.
        """
        supervisor = self._supervisor
        due = self._is_due()
        if due:
            planned = self._pending[0].planned
            victim = supervisor.living(planned.slot) if planned.slot is not None else None
            if planned.kind == "join" or (victim is not None and victim.state == "joining" and victim.members):
                return True
        patient = due or supervisor.step >= supervisor.spec.steps - 1
        return self._somebody_comes(_RETURNING if patient else _RETURNING & {"join"})

    def _somebody_comes(self, kinds: frozenset[FaultKind]) -> bool:
        """Whether a fault of these kinds is under way that ends with somebody's coming, who has not knocked yet."""
        now = time.time()
        coming = [f for f in self.faults if f.injected is not None and f.ended is None and f.planned.kind in kinds]
        hopeful = [f for f in coming if self._expected.get(f.planned.index, now + 1) > now]
        if not hopeful:
            return False
        away = any(fault.planned.index not in self._expected for fault in hopeful)
        return away or self._supervisor.waiting() < len(hopeful)

    def peer_says(self, life: PeerRecord, kind: str, body: dict[str, Any]) -> None:
        """Take note of what a peer's message means for the faults aimed at it."""
        for fault in self.faults:
            if fault.peer != life.name or fault.injected is None:
                continue
            match fault.planned.kind, kind:
                case "kill", "fired":
                    fault.fired, fault.detail = body["time"], f"in {body['where']}"
                    life.planned_end = "kill"
                case "leave", "left":
                    fault.fired = fault.ended = body["time"]
                    life.planned_end = "leave"
                case "stop", "evicted":
                    self._expected[fault.planned.index] = time.time() + _KNOCK_TIMEOUT
                case "stop", "joined" if fault.fired is not None and fault.ended is None:
                    fault.ended = body["time"]
                case "join", "joined" if fault.fired is None:
                    fault.fired = fault.ended = body["time"]

    def coordinator_is_down(self) -> bool:
        """The coordinator ended: return whether a fault explains it."""
        if self._coordinator_fault is None:
            return False
        if self._coordinator_fault.fired is None:
            self._coordinator_fault.fired = time.time()
        return True

    def coordinator_is_back(self) -> None:
        """The coordinator listens (again)."""
        if self._coordinator_fault is not None:
            self._coordinator_fault.ended = time.time()
            self._coordinator_fault = None

    def _may_strike(self, planned: Planned) -> bool:
        supervisor = self._supervisor
        if planned.kind == "coordinator":
            return supervisor.listening and self._coordinator_fault is None
        assert planned.slot is not None
        life = supervisor.living(planned.slot)
        if planned.kind == "join":
            return life is not None and life.state == "warm"
        if life is None or life.state != "running" or self._is_struck(life):
            return False
        others = (other for other in supervisor.lives.values() if other is not life and other.state == "running")
        return supervisor.spec.others is not None or any(not self._is_struck(other) for other in others)

    def _is_struck(self, life: PeerRecord) -> bool:
        """Whether a fault that takes the peer away was sent to it and has not ended."""
        return any(
            fault.peer == life.name and fault.injected is not None and fault.ended is None
            for fault in self.faults
            if fault.planned.kind != "join"
        )

    def _inject(self, fault: FaultRecord) -> None:
        supervisor, planned = self._supervisor, fault.planned
        fault.injected = time.time()
        if planned.kind == "coordinator":
            assert supervisor.coordinator is not None
            fault.peer = "coordinator"
            self._coordinator_fault = fault
            supervisor.coordinator.signal(signal.SIGKILL)
        elif planned.kind == "join":
            assert planned.slot is not None
            spare = supervisor.living(planned.slot)
            assert spare is not None
            fault.peer = spare.name
            supervisor.release(spare)
            self._expected[planned.index] = time.time() + _KNOCK_TIMEOUT
        else:
            assert planned.slot is not None
            life = supervisor.living(planned.slot)
            assert life is not None
            fault.peer, fault.member = life.name, life.members[-1]
            self._strike_peer(fault, life)
        supervisor.note("fault", fault=planned.index, what=planned.kind, step=planned.step, peer=fault.peer)

    def _strike_peer(self, fault: FaultRecord, life: PeerRecord) -> None:
        child = self._supervisor.children[life.name]
        if fault.planned.kind == "kill":
            child.send({"do": "die", "point": fault.planned.point, "skip": fault.planned.skip})
        elif fault.planned.kind == "leave":
            child.send({"do": "leave"})
        else:
            child.signal(signal.SIGSTOP)
            life.state = "stopped"
            fault.fired = time.time()
            self._supervisor.after(
                self._supervisor.spec.heartbeat_timeout + _STOPPED_LONGER, lambda: self._wake(life, fault)
            )

    def _wake(self, life: PeerRecord, fault: FaultRecord) -> None:
        fault.detail = f"woken after {time.time() - (fault.fired or 0):.1f} s"
        if life.state == "stopped":
            life.state = "returning"
            self._expected[fault.planned.index] = time.time() + _KNOCK_TIMEOUT
            self._supervisor.children[life.name].signal(signal.SIGCONT)
            self._supervisor.note("woken", peer=life.name, fault=fault.planned.index)

    def _warm_up(self) -> None:
        """Start the process of the next peer to join ahead of time: its imports take seconds, joining does not."""
        supervisor = self._supervisor
        upcoming = next((fault.planned for fault in self._pending if fault.planned.kind == "join"), None)
        begun = supervisor.step > 0 or supervisor.spec.others is not None
        if upcoming is None or upcoming.slot is None or not begun:
            return
        if supervisor.living(upcoming.slot) is None:
            supervisor.start_peer(upcoming.slot, spare=True)
