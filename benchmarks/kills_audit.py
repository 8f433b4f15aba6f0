"""Judges what the peers of `benchmarks.kills` report: sums, agreement among survivors, recoveries and leaks."""

from typing import Any

from launch.churn_strike import Strike
from launch.crew import Message, Peer

RSS_LIMIT = 160 << 20
"""Bytes by which a member may have grown when it has left: ten times the largest tensor, whatever it lived through."""


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

    def gone(self, peer: int, when: float) -> None:
        """It has ended: nobody waits for its results."""
        for strike in self.strikes[-4:]:
            strike.survivors.discard(peer)
            if strike.victim == peer:
                strike.gone = when - strike.time

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
            names = ", ".join(message["threads"])
            self.leaks.append(f"peer {peer} holds {', '.join(more)} more than before it joined; its threads: {names}")
