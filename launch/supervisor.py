"""The process that holds a run together: starts the coordinator and peers, injects churn, restarts, and ends all.

`Supervisor.run` is called by `launch.train` from the main thread (children die with the thread that starts them).
It reads one queue of messages; there is no other state to lock. What the run was worth is judged by `launch.verdict`.
"""

import contextlib
import heapq
import itertools
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from collectives.errors import MemberLost
from launch.faults import Planned
from launch.injector import Injector
from launch.process import Child, Inbox, end_all
from launch.record import Observer, PeerRecord, RunRecord, entry

_RESTART_DELAY = 0.3
_MOST_RESTARTS = 3
_ASK_OTHERS = 0.1
_LATE_GRACE = 3.0


class Others(Protocol):
    """What a supervisor needs to know of those that run the other peers of its launch."""

    def furthest(self) -> int:
        """Return the highest step that any peer of theirs has reached."""

    def need_us(self) -> bool:
        """Whether they still need this supervisor (its coordinator) although its own peers have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What one supervisor is to start and to do. Times in seconds."""

    slots: tuple[int, ...]
    """The peers, by number, that it starts at once."""
    out: Path
    """The run's folder; logs go to its `logs`."""
    environ: Mapping[str, str]
    """The children's environment, with the run's token."""
    peer: Sequence[str]
    """Command of a peer."""
    start: Mapping[str, Any]
    """The start command given to each peer; `coordinator` and `gates` are added."""
    coordinator: Sequence[str] | None
    """Command of the coordinator, `--listen ADDRESS` (and `--new` the first time) is appended; None: not ours."""
    address: str
    """HOST:PORT of the coordinator; port 0 where it is ours and any will do."""
    door: Callable[[str], int]
    """Returns how many peers wait to be let in by the coordinator at an address."""
    steps: int
    """Steps of the run."""
    faults: tuple[Planned, ...] = ()
    heartbeat_timeout: float = 2.0
    restart: bool = False
    """Whether a peer that ends by a signal or is lost is started again as a joiner."""
    others: "Others | None" = None
    """The supervisors of the same launch, where this one sees only a part of the group."""
    timeout: float = 3600.0
    """The whole run may take this long."""
    stall: float = 120.0
    """Nobody making progress for this long ends the run."""


class Supervisor:
    """Runs one Spec. `observe` is told of everything that happens, in order, as log entries."""

    def __init__(self, spec: Spec, observe: Observer) -> None:
        self.spec = spec
        self.record = RunRecord()
        self.inbox: Inbox = queue.SimpleQueue()
        self.address = spec.address
        self.coordinator: Child | None = None
        self.listening = False
        self.step = 0
        self.children: dict[str, Child] = {}
        self.lives: dict[str, PeerRecord] = {}
        self._observe = observe
        self._injector = Injector(self, spec.faults)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count()
        self._restarts: dict[int, int] = {}
        self._asked_others = 0.0
        self._founded = False
        self._over_at = 0.0
        self._progress_at = time.monotonic()

    def run(self) -> RunRecord:
        """Run to the end and return the record. However it ends, no process started here is left."""
        deadline = time.monotonic() + self.spec.timeout
        with self._signals():
            try:
                self._begin()
                while self._going(deadline):
                    self._turn()
            finally:
                self._end()
        return self.record

    def note(self, kind: str, **fields: Any) -> None:
        """Log something that this supervisor did or saw."""
        self._observe(entry("supervisor", kind, **fields))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Call `action` from the main loop in `delay` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._counter), action))

    def living(self, slot: int) -> PeerRecord | None:
        """Return the life of peer `slot` that has not ended, if there is one."""
        return next((life for life in self.lives.values() if life.slot == slot and life.state != "ended"), None)

    def waiting(self) -> int:
        """Return how many peers wait at our coordinator's door to be let in; 0 while it is down."""
        return self.spec.door(self.address) if self.listening else 0

    def start_peer(self, slot: int, spare: bool = False) -> PeerRecord:
        """Start the process of a peer; a spare waits, warm, until `release`."""
        lives = sum(life.slot == slot for life in self.lives.values())
        name = f"peer-{slot}" + (f".{lives}" if lives else "")
        child = self._start(name, self.spec.peer)
        life = PeerRecord(name, slot, child.pid, "spare" if spare else "starting")
        self.children[name] = child
        self.lives[name] = life
        self.record.peers.append(life)
        self.note("started", peer=name, pid=child.pid, spare=spare)
        if not spare:
            self.release(life)
        return life

    def release(self, life: PeerRecord) -> None:
        """Let a started peer join, as soon as the coordinator listens."""
        life.state = "joining"
        if self.listening:
            self._send_start(life)

    def _begin(self) -> None:
        (self.spec.out / "logs").mkdir(parents=True, exist_ok=True)
        if self.spec.coordinator is None:
            self.listening = True
        else:
            self._start_coordinator()
        for slot in self.spec.slots:
            self.start_peer(slot)

    def _start(self, name: str, command: Sequence[str]) -> Child:
        log = self.spec.out / "logs" / f"{name}.log"
        return Child(name, command, self.spec.environ, log=log, inbox=self.inbox)

    def _start_coordinator(self) -> None:
        assert self.spec.coordinator is not None
        command = [*self.spec.coordinator, "--listen", self.address, *([] if self._founded else ["--new"])]
        self.coordinator = self._start("coordinator", command)
        self.note("started", peer="coordinator", pid=self.coordinator.pid)

    def _send_start(self, life: PeerRecord) -> None:
        gates = [gate for gate in self._injector.gates if gate > self._injector.opened]
        command = {"do": "start", **self.spec.start, "coordinator": self.address, "gates": gates}
        self.children[life.name].send(command)

    def _going(self, deadline: float) -> bool:
        if self.record.signal or self.record.coordinator_error is not None:
            return False
        if time.monotonic() > deadline:
            self.record.timeout = f"the run did not end within {self.spec.timeout:g} s (--timeout)"
        elif time.monotonic() - self._progress_at > self.spec.stall:
            self.record.timeout = f"no peer made progress for {self.spec.stall:g} s (--stall-timeout)"
        else:
            living = any(life.state not in {"spare", "warm", "ended"} for life in self.lives.values())
            return living or (self.spec.others is not None and self._others_go_on(self.spec.others))
        self.note("timeout", detail=self.record.timeout)
        return False

    def _others_go_on(self, others: Others) -> bool:
        return self._injector.expects_revival() or others.need_us()

    def _advance(self, step: int) -> None:
        if step > self.step:
            self.step = step
            self._progress_at = time.monotonic()

    def _turn(self) -> None:
        """Take one message, run the timers that are due, and strike where a fault is due."""
        wait = self._timers[0][0] - time.monotonic() if self._timers else 0.2
        with contextlib.suppress(queue.Empty):
            self._handle(*self.inbox.get(timeout=min(max(wait, 0.001), 0.2)))
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        if self.spec.others is not None and time.monotonic() - self._asked_others > _ASK_OTHERS:
            self._asked_others = time.monotonic()
            self._advance(self.spec.others.furthest())
        self._injector.strike()
        self._dismiss_latecomers()

    def _dismiss_latecomers(self) -> None:
        """End peers that still want to join when all others have come to the end: nobody will let them in."""
        living = [life for life in self.lives.values() if life.state not in {"spare", "warm", "ended"}]
        over = any(life.result is not None for life in self.lives.values())
        if not over or not living or any(life.state not in {"joining", "returning"} for life in living):
            self._over_at = time.monotonic()
        elif time.monotonic() - self._over_at > _LATE_GRACE:
            for life in living:
                life.planned_end = "late"
                self.children[life.name].signal(signal.SIGTERM)

    def _handle(self, name: str, body: dict[str, Any]) -> None:
        kind = body["type"]
        if not name:
            self.record.signal = body["number"]
            self.note("signal", number=body["number"])
            return
        self._observe({"source": name, **body})
        if name == "coordinator":
            self._coordinator_says(kind, body)
        else:
            self._peer_says(self.lives[name], kind, body)

    def _coordinator_says(self, kind: str, body: dict[str, Any]) -> None:
        assert self.coordinator is not None
        if kind == "listening":
            self.address = body["address"]
            self.listening = self._founded = True
            self._injector.coordinator_is_back()
            for life in self.lives.values():
                if life.state == "joining" and not life.members:
                    self._send_start(life)
        elif kind == "error":
            self.record.coordinator_error = {"message": body["message"], "exit_code": body["exit_code"]}
        elif kind == "exit":
            self.coordinator.close()
            self.listening = False
            self._coordinator_ended(body["code"])

    def _coordinator_ended(self, code: int) -> None:
        if self.record.coordinator_error is not None:
            return
        if not self._injector.coordinator_is_down():
            self.record.coordinator_deaths += 1
            if code > 0 or self.record.coordinator_deaths > _MOST_RESTARTS:
                assert self.coordinator is not None
                message = f"the coordinator ended with code {code}: {self.coordinator.tail(3) or 'it said nothing'}"
                self.record.coordinator_error = {"message": message, "exit_code": code if code > 0 else 3}
                return
        self.after(_RESTART_DELAY, self._start_coordinator)

    def _peer_says(self, life: PeerRecord, kind: str, body: dict[str, Any]) -> None:
        if kind == "ready" and life.state == "spare":
            life.state = "warm"
        elif kind == "joined":
            life.members.append(body["member"])
            self._progress_at = time.monotonic()
        elif kind == "progress":
            life.step, life.loss = body["step"], body.get("loss", life.loss)
            self._progress_at = time.monotonic()
            self._advance(life.step)
            if life.state == "joining" or (life.state == "returning" and body["member"] == life.members[-1]):
                life.state = "running"
        elif kind == "done":
            life.result = {key: value for key, value in body.items() if key not in {"type", "time"}}
        elif kind == "late":
            life.planned_end = "late"
        elif kind == "error":
            life.error = {key: body[key] for key in ("error", "message", "exit_code")}
        elif kind == "exit":
            life.code, life.state = body["code"], "ended"
            self.children[life.name].close()
            self._peer_ended(life)
        self._injector.peer_says(life, kind, body)

    def _peer_ended(self, life: PeerRecord) -> None:
        """Keep what a peer that failed said last; with `restart`, replace one that was lost."""
        if life.code == 0 or life.planned_end == "late":
            return
        if not life.planned_end:
            life.tail = self.children[life.name].tail()
            self._restarts[life.slot] = self._restarts.get(life.slot, 0) + 1
        lost = life.code is not None and (life.code < 0 or life.code == MemberLost.exit_code)
        wanted = self.spec.restart and not self._injector.will_revive(life.slot)
        if lost and wanted and self._restarts.get(life.slot, 0) <= _MOST_RESTARTS:
            self.start_peer(life.slot)

    def _end(self) -> None:
        end_all([*self.children.values(), *([self.coordinator] if self.coordinator is not None else [])])
        for life in self.lives.values():
            life.state = "ended"
            life.code = self.children[life.name].popen.returncode
        self.record.faults = self._injector.faults

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While inside, a signal that asks us to end is a message. An ignored SIGHUP (nohup) stays ignored."""

        def arrived(number: int, _frame: object) -> None:
            self.inbox.put(("", {"type": "signal", "number": number}))

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        former = {number: signal.signal(number, arrived) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
