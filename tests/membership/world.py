"""A simulated run: virtual time, a heap of events, and everybody who takes part. Deterministic for a seed.

`World.play` plays one history to its end; `judge.Judge` watches every step of it and raises `Violation`.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from tests.membership.faults import Faults
from tests.membership.headquarters import Headquarters
from tests.membership.history import Fault, History
from tests.membership.host import Host
from tests.membership.judge import Judge, Violation
from tests.membership.mesh import Mesh

DEADLINE = 150.0
"""Virtual seconds in which everything must have ended: some multiples of all timeouts and of the longest fault."""

MOST_EVENTS = 20_000
"""A history has some hundreds."""

Event = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class World:
    """One history in play."""

    def __init__(self, history: History, tracing: bool = False) -> None:
        self.history = history
        self.rng = Random(history.seed ^ 0x5EED)
        self.now = 0.0
        self.events = 0
        self.lines: list[str] | None = [] if tracing else None
        self._heap: list[Event] = []
        self._order = 0
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
        self._armed: dict[str, list[list[Any]]] = {}
        for fault in history.faults:
            if fault.point:
                self._armed.setdefault(fault.point, []).append([fault.count, fault])
            else:
                self.at(fault.time, self._strike, fault, None)

    def add_host(self, index: int, time: float) -> None:
        """Start a process that joins at that time."""
        host = Host(self, index)
        self.hosts.append(host)
        self.at(time, host.arrive)

    def play(self) -> None:
        """Play the history. Raises `Violation` if a rule was broken."""
        heap, events = self._heap, 0
        while heap:
            self.now, _, action, given = heappop(heap)
            if self.now > DEADLINE or events > MOST_EVENTS:
                raise Violation(
                    f"no end by {self.now:.0f} s, after {self.events} events: "
                    + "; ".join(host.describe() for host in self.hosts)
                )
            action(*given)
            self.events = events = events + 1
            if not self.active and self._over():
                break
        self.judge.finish()

    # --- time ---

    def at(self, time: float, action: Callable[..., None], *given: Any) -> None:
        """Do something at a time."""
        self._order += 1
        heappush(self._heap, (time, self._order, action, given))

    def after(self, delay: float, action: Callable[..., None], *given: Any) -> None:
        """Do something after a delay."""
        self._order += 1
        heappush(self._heap, (self.now + delay, self._order, action, given))

    def lag(self, scale: float) -> float:
        """Draw a delay: mostly about `scale`, at times several times that."""
        draw = self.rng.random()
        return scale * (0.2 + draw) if draw < 0.9 else scale * 6 * (draw - 0.8) / 0.2

    # --- faults ---

    def probe(self, point: str, host: Host | None = None) -> None:
        """Reach a point of the protocol: whatever is due there strikes."""
        armed = self._armed.get(point)
        if armed:
            for entry in armed:
                entry[0] -= 1
                if not entry[0]:
                    self._strike(entry[1], host)
            self._armed[point] = [entry for entry in armed if entry[0] > 0]

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
        waiting = [host for host in self.hosts if not host.finished]
        if not waiting:
            return True
        if any(not host.arrived or host.stopped for host in waiting):
            return False
        coordinator = self.headquarters.coordinator
        if coordinator is None or self.headquarters.stopped or coordinator.change is not None:
            return False
        if coordinator.members:
            return all(self.host_of[m].idle for m in coordinator.members)
        founding = coordinator.decision is None or coordinator.decision.ended
        return len(waiting) < (self.history.founders if founding else self.history.options.min_members)
