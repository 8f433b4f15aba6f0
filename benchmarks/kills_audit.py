"""Judges what the peers of `benchmarks.kills` report: sums, agreement among survivors, recoveries and leaks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.crew import Message, Peer

RSS_LIMIT = 160 << 20
"""Bytes by which a member may have grown when it has left: ten times the largest tensor, whatever it lived through."""


@dataclass(slots=True)
class Strike:
    """One signal sent to a member, and what came of it."""

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
    ready: dict[int, float] = field(default_factory=dict)
    good: dict[int, float] = field(default_factory=dict)
    evicted: bool = False
    _epochs: dict[int, int] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether every survivor has returned a result since."""
        return self.survivors <= self.good.keys()

    def report(self) -> dict[str, Any]:
        """All of it, for JSON; times in milliseconds from the signal."""
        times = {what: _milliseconds(getattr(self, what)) for what in ("detected", "ready", "good")}
        plain = ("number", "kind", "point", "victim", "member", "inside", "overlapping", "from_staging", "run_again")
        return {**{name: getattr(self, name) for name in plain}, **times}

    def hear(self, peer: int, message: Message) -> None:
        """Take note of a survivor's message."""
        if peer not in self.survivors or message["time"] < self.time:
            return
        match message:
            case {"type": "event", "event": "fenced", "time": when}:
                self.detected.setdefault(peer, when - self.time)
            case {"type": "event", "event": "epoch", "epoch": epoch, "lost": lost} if self.member in lost:
                self._epochs[peer] = epoch
            case {"type": "event", "event": "ready", "epoch": epoch, "time": when} if peer in self._epochs:
                if epoch >= self._epochs[peer]:
                    self.ready.setdefault(peer, when - self.time)
            case {"type": "op", "contributors": contributors, "done": done} if done > self.time:
                if self.member not in contributors:
                    self.run_again |= peer not in self.good and message["attempts"] > 1
                    self.good.setdefault(peer, done - self.time)
                elif message["from_staging"]:
                    self.from_staging = True
                    self.good.setdefault(peer, done - self.time)


def _milliseconds(times: dict[int, float]) -> dict[int, float]:
    return {peer: round(1000 * seconds, 1) for peer, seconds in times.items()}


class Audit:
    """All strikes, all failures, and the results to compare, of one group after the other."""

    def __init__(self) -> None:
        self.strikes: list[Strike] = []
        self.wrong: list[str] = []
        self.hangs: list[str] = []
        self.leaks: list[str] = []
        self.evictions: list[str] = []
        self.operations = 0
        self.checked_bytes = 0
        self.growth: list[int] = []
        self._results: dict[int, tuple[int, Any]] = {}
        self._epochs: dict[int, int] = {}

    def new_group(self) -> None:
        """Begin with another run: its operations count from one."""
        self._results.clear()
        self._epochs.clear()

    def open_strikes(self) -> list[Strike]:
        """Those that not every survivor has got over."""
        return [strike for strike in self.strikes if not strike.over]

    def hear(self, peer: Peer, message: Message) -> None:
        """Judge a message."""
        for strike in self.strikes[-4:]:
            strike.hear(peer.name, message)
        match message["type"]:
            case "op":
                self._operation(peer.name, message)
            case "event" if message["event"] == "epoch":
                self._epoch(peer.name, message["epoch"])
            case "failed":
                self.wrong.append(f"peer {peer.name} ended with {message['error']}: {message['message']}")
            case "joined":
                self._epochs.pop(peer.name, None)
            case "usage":
                self._usage(peer.name, message)

    def gone(self, peers: Iterable[int]) -> None:
        """These have ended: nobody waits for their results."""
        for strike in self.strikes[-4:]:
            strike.survivors.difference_update(peers)

    def _operation(self, peer: int, message: Message) -> None:
        self.operations += 1
        self.checked_bytes += message["bytes"]
        number = message["number"]
        self.wrong += [f"operation {number} of peer {peer}: {text}" for text in message["wrong"]]
        result = (message["contributors"], message["epoch"], message["digest"])
        other, first = self._results.setdefault(number, (peer, result))
        if result != first:
            self.wrong.append(f"operation {number}: peer {peer} has {result}, peer {other} has {first}")

    def _epoch(self, peer: int, epoch: int) -> None:
        if epoch <= self._epochs.get(peer, 0):
            self.wrong.append(f"peer {peer} was told of epoch {epoch} after {self._epochs[peer]}")
        self._epochs[peer] = epoch

    def _usage(self, peer: int, message: Message) -> None:
        before, after = message["before"], message["after"]
        self.growth.append(after["rss"] - before["rss"])
        more = [f"{after[key] - before[key]} {key}" for key in before if key != "rss" and after[key] > before[key]]
        if self.growth[-1] > RSS_LIMIT:
            more.append(f"{self.growth[-1] >> 20} MiB")
        if more:
            self.leaks.append(f"peer {peer} holds {', '.join(more)} more than before it joined")
