"""A signal sent to a member of a crew, and how the survivors got over it, as they tell in their messages.

Peers report "event" messages (`Desk.join`) and "op" messages with `done` (seconds since 1970), `contributors`,
`attempts` and `from_staging` of each operation. Used by `launch.churn_audit` and by the benchmark of recovery.
"""

from dataclasses import dataclass, field
from typing import Any

from launch.crew import Message

STAGES = ("detected", "announced", "ready", "good")
"""Fenced the old epoch; learned of the new one; has its transport; returned from an operation that got over it."""


@dataclass(slots=True)
class Strike:
    """One signal sent to a member, and what came of it.

    Stages hold, per survivor, seconds from the signal. `point` is the fault point where it was struck, "" at random;
    `inside` tells whether it was in an operation then, `gone` the seconds until a killed process had ended.
    """

    number: int
    kind: str
    point: str
    victim: int
    member: int
    survivors: set[int]
    time: float = 0.0
    inside: bool = False
    overlapping: bool = False
    from_staging: bool = False
    run_again: bool = False
    detected: dict[int, float] = field(default_factory=dict)
    announced: dict[int, float] = field(default_factory=dict)
    ready: dict[int, float] = field(default_factory=dict)
    good: dict[int, float] = field(default_factory=dict)
    evicted: bool = False
    gone: float = 0.0
    _epochs: dict[int, int] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether every survivor has returned a result since."""
        return self.survivors <= self.good.keys()

    def report(self) -> dict[str, Any]:
        """All of it, for JSON; times in milliseconds from the signal."""
        times = {what: _milliseconds(getattr(self, what)) for what in STAGES}
        plain = ("number", "kind", "point", "victim", "member", "inside", "overlapping", "from_staging", "run_again")
        return {**{name: getattr(self, name) for name in plain}, "gone": round(1000 * self.gone, 1), **times}

    def hear(self, peer: int, message: Message) -> None:
        """Take note of a survivor's message."""
        if peer not in self.survivors or message["time"] < self.time:
            return
        match message:
            case {"type": "event", "event": "fenced", "time": when}:
                self.detected.setdefault(peer, when - self.time)
            case {"type": "event", "event": "epoch", "epoch": epoch, "lost": lost, "time": when} if self.member in lost:
                self._epochs[peer] = epoch
                self.announced.setdefault(peer, when - self.time)
            case {"type": "event", "event": "ready", "epoch": epoch, "time": when} if peer in self._epochs:
                if epoch >= self._epochs[peer]:
                    self.ready.setdefault(peer, when - self.time)
            case {"type": "op", "contributors": contributors, "done": done} if contributors and done > self.time:
                if self.member not in contributors:
                    self.run_again |= peer not in self.good and message["attempts"] > 1
                    self.good.setdefault(peer, done - self.time)
                elif message["from_staging"]:
                    self.from_staging = True
                    self.good.setdefault(peer, done - self.time)


def _milliseconds(times: dict[int, float]) -> dict[int, float]:
    return {peer: round(1000 * seconds, 1) for peer, seconds in times.items()}
