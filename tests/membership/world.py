"""A simulated run: virtual time, a heap of events, and everybody who takes part. Deterministic for a seed.

`World.play` plays one history to its end; `judge.Judge` watches every step of it and raises `Violation`.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

from tests.membership.faults import Faults
from tests.membership.headquarters import Headquarters
from tests.membership.history import Fault, History
from tests.membership.host import Host
from tests.membership.judge import Judge, Violation
from tests.membership.mesh import Mesh
from tests.membership.process import Killed, Process

DEADLINE = 150.0
"""Virtual seconds in which everything must have ended: some multiples of all timeouts and of the longest fault."""

LONG = 200
"""Events of a history that counts as a long one. One that is over before goes on."""

MOST_ROUNDS = 5
"""How often it goes on, and the first time."""

MOST_EVENTS = 20_000
"""A history has some hundreds."""

Event = tuple[float, int, Process, Callable[..., None], tuple[Any, ...]]


class World:
    """One history in play."""

    def __init__(self, history: History, tracing: bool = False) -> None:
        self.history = history
        self.rng = Random(history.seed ^ 0x5EED)
        self.random = self.rng.random
        self.now = 0.0
        self.events = 0
        self.lines: list[str] | None = [] if tracing else None
        self._deadline = DEADLINE
        self._rounds = 1
        self.network = Process()
        """What neither dies nor stops."""
        self.armed: dict[str, list[list[Any]]] = {}
        """Per point, the faults to come there and in how many times."""
        self._heap: list[Event] = []
        self._order = count(1)
        self.judge = Judge(self)
        self.faults = Faults(self)
        self.headquarters = Headquarters(self)
        self.meshes: dict[int, Mesh] = {}
        self.host_of: dict[int, Host] = {}
        self.hosts: list[Host] = []
        self.active = 0
        """Hosts that are members and not at the end of their program."""
        for index, time in enumerate(history.arrivals):
            self.add_host(index, time)
        for fault in history.faults:
            if fault.point:
                self.armed.setdefault(fault.point, []).append([fault.count, fault])
            else:
                self.at(fault.time, self.network, self._strike, fault, None)

    def add_host(self, index: int, time: float) -> None:
        """Start a process that joins at that time."""
        host = Host(self, index)
        self.hosts.append(host)
        self.at(time, self.network, host.arrive)

    def play(self) -> None:
        """Play the history. Raises `Violation` if a rule was broken."""
        heap, events = self._heap, 0
        while heap:
            self.now, _, process, action, given = heappop(heap)
            if self.now > self._deadline or events > MOST_EVENTS:
                self.events = events
                raise Violation(
                    f"no end by {self.now:.0f} s, after {self.events} events: "
                    + "; ".join(host.describe() for host in self.hosts)
                )
            if process.stopped:
                process.backlog.append((action, given))
            elif not process.dead:
                # As `Process.get`, which would cost as much as the rest of this.
                try:  # noqa: SIM105
                    action(*given)
                except Killed:
                    pass
            events += 1
            if not self.active and self._over() and not (events < LONG and self._goes_on()):
                break
        self.events = events
        self.judge.finish()

    # --- time ---

    def at(self, time: float, process: Process, action: Callable[..., None], *given: Any) -> None:
        """Have a process do something at a time."""
        heappush(self._heap, (time, next(self._order), process, action, given))

    def after(self, delay: float, process: Process, action: Callable[..., None], *given: Any) -> None:
        """Have a process do something after a delay."""
        heappush(self._heap, (self.now + delay, next(self._order), process, action, given))

    def lag(self, scale: float) -> float:
        """Draw a delay: mostly about `scale`, at times several times that."""
        draw = self.random()
        return scale * (0.2 + draw) if draw < 0.9 else scale * 6 * (draw - 0.8) / 0.2

    # --- faults ---

    def probe(self, point: str, host: Host | None = None) -> None:
        """Reach a point of the protocol: whatever is due there strikes."""
        armed = self.armed.get(point)
        if armed:
            for entry in armed:
                entry[0] -= 1
                if not entry[0]:
                    self._strike(entry[1], host)
            left = self.armed[point] = [entry for entry in armed if entry[0] > 0]
            if not left:
                del self.armed[point]

    def _strike(self, fault: Fault, host: Host | None) -> None:
        if fault.where >= 0 or host is None:
            host = self.hosts[max(fault.where, 0)]
        self.judge.count(f"fault {fault.what} at {fault.point or 'a time'}")
        self.say(f"FAULT {fault.what} at {fault.point or 'its time'}: {host.name}")
        getattr(self.faults, fault.what)(fault, host)

    def say(self, text: str) -> None:
        """Add a line to the trace."""
        if self.lines is not None:
            self.lines.append(f"{self.now:9.4f}  {text}")

    # --- the end ---

    def _over(self) -> bool:
        """Whether nothing can happen any more that matters: nobody is under way, and who waits waits in vain."""
        if self.headquarters.outdated and any(host.idle and host.core.error is None for host in self.hosts):
            return False  # these will tell it so
        waiting = 0
        for host in self.hosts:
            if not host.finished:
                if host.stopped or not host.arrived:
                    return False
                waiting += 1
        if not waiting:
            return True
        coordinator = self.headquarters.coordinator
        if coordinator is None or self.headquarters.stopped or coordinator.change is not None:
            return False
        if coordinator.members:
            return all(self.host_of[m].idle for m in coordinator.members)
        founding = coordinator.decision is None or coordinator.decision.ended
        return waiting < (self.history.founders if founding else self.history.options.min_members)

    def _goes_on(self) -> bool:
        """Have more happen, if it can: others come, and those who are left call the program once more."""
        left = [host for host in self.hosts if host.finished == "done" and not host.dead and host.core.error is None]
        if any(not host.program.ended for host in left) or self.headquarters.outdated or self._rounds == MOST_ROUNDS:
            return False
        self._rounds += 1
        self._deadline = self.now + DEADLINE
        self.judge.count("called the program again" if left else "others came")
        if left:
            self.history.repeat()
        for host in left:
            host.go_on()
        for _ in range(1 if left else self.history.founders):
            self.add_host(len(self.hosts), self.now + self.rng.random() * 0.5)
        return True
