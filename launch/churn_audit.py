"""Judges what the peers of a churn run report: values, agreement, healed state, epochs, and what is left behind.

Pure bookkeeping, for `launch.churn_lab`. A peer is a process, named by a number; it may be several members, one after
the other.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from launch.churn_strike import Strike
from launch.crew import Message

RSS_LIMIT = 160 << 20
"""Bytes by which a member may have grown when it has left, whatever it lived through."""
_REMEMBERED = 4000
"""Operations whose results are kept for those that come late."""


@dataclass(slots=True)
class Audit:
    """What was found, and what is needed to find it."""

    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    false_evictions: list[str] = field(default_factory=list)
    """Reasons of evictions that no fault explains."""
    strikes: list[Strike] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    """By kind, counted once on each member."""
    interrupted: int = 0
    """Operations that ended with `MemberLost`."""
    run_again: int = 0
    from_staging: int = 0
    checked_bytes: int = 0
    syncs: int = 0
    healed_by_sync: int = 0
    saved: dict[int, tuple[int, str]] = field(default_factory=dict)
    """By step, a peer that knows its checkpoint to be there, and the hash of what is in it."""
    growth: list[int] = field(default_factory=list)
    lent: Counter[str] = field(default_factory=Counter)
    """The most that a library held in a member that left, by name; it is no leak of ours."""
    healed: dict[int, float] = field(default_factory=dict)
    """Members that may give state, also those that went since, and since when. Ids are never used again."""
    _results: dict[int, tuple[int, Any]] = field(default_factory=dict)
    _states: dict[int, tuple[int, str]] = field(default_factory=dict)
    _epochs: dict[int, int] = field(default_factory=dict)
    _gifts: list[tuple[float, int, tuple[int, ...]]] = field(default_factory=list)

    def open_strikes(self) -> list[Strike]:
        """Those that not every survivor has got over."""
        return [strike for strike in self.strikes[-64:] if not strike.over]

    def hear(self, peer: int, message: Message) -> None:
        """Judge a message."""
        for strike in self.open_strikes():
            strike.hear(peer, message)
        match message["type"]:
            case "op":
                self._operation(peer, message)
            case "synced":
                self._synced(peer, message)
            case "saved":
                self._saved(peer, message["number"], message["state"])
            case "event" if message["event"] == "epoch":
                self._epoch(peer, message["epoch"])
            case "failed":
                self.wrong.append(f"peer {peer} ended with {message['error']}: {message['message']}")
            case "joined":
                self._epochs[peer] = message["epoch"]
                if message["founder"]:
                    self.healed[message["member"]] = message["time"]
            case "usage":
                self._usage(peer, message)

    def struck(self, peer: int) -> None:
        """It was struck: nobody waits for it to get over earlier strikes, and its times would be those of its own."""
        for strike in self.open_strikes():
            strike.survivors.discard(peer)

    def gone(self, peer: int, when: float) -> None:
        """It has ended: nobody waits for its results."""
        for strike in self.strikes[-64:]:
            if strike.victim == peer and not strike.gone:
                strike.gone = when - strike.time
        self.struck(peer)

    def close(self) -> None:
        """At the end: what can only be judged when everything has been heard."""
        for when, number, givers in self._gifts:
            unhealed = [giver for giver in givers if self.healed.get(giver, when) >= when]
            if unhealed:
                self.wrong.append(f"the state of operation {number} was given by members {unhealed}, not healed then")

    def _operation(self, peer: int, message: Message) -> None:
        self.operations[message["operation"]] += 1
        self.checked_bytes += message["bytes"]
        self.interrupted += not message["attempts"]
        self.run_again += message["attempts"] > 1
        self.from_staging += message["from_staging"]
        number = message["number"]
        self.wrong += [f"operation {number} of peer {peer}: {text}" for text in message["wrong"]]
        result: Any = (message["history"],)
        if message["operation"] != "send_recv":
            result = (message["contributors"], message["epoch"], message["digest"], message["history"])
        other, first = self._results.setdefault(number, (peer, result))
        if result != first:
            self.wrong.append(
                f"operation {number} ({message['operation']}): peer {peer} has {result}, peer {other} has {first}"
            )
        self._results.pop(number - _REMEMBERED, None)
        self._states.pop(number - _REMEMBERED, None)

    def _synced(self, peer: int, message: Message) -> None:
        self.syncs += 1
        self.healed_by_sync += message["healed"]
        number, state = message["number"], message["state"]
        if state != message["winner"]:
            self.wrong.append(f"peer {peer} synced to {message['winner']} and holds {state}")
        other, first = self._states.setdefault(number, (peer, state))
        if state != first:
            self.wrong.append(f"the state of operation {number} is {state} at peer {peer}, and {first} at peer {other}")
        self._gifts.append((message["time"], number, tuple(message["givers"])))
        self.healed.setdefault(message["member"], message["time"])

    def _saved(self, peer: int, step: int, state: str) -> None:
        other, first = self.saved.setdefault(step, (peer, state))
        if state != first:
            self.wrong.append(f"checkpoint {step}: peer {peer} saved {state}, peer {other} {first}")

    def _epoch(self, peer: int, epoch: int) -> None:
        if epoch <= self._epochs.get(peer, 0):
            self.wrong.append(f"peer {peer} was told of epoch {epoch} after {self._epochs[peer]}")
        self._epochs[peer] = epoch

    def _usage(self, peer: int, message: Message) -> None:
        before, after = message["before"], message["after"]
        self.growth.append(after["rss"] - before["rss"])
        self.lent |= Counter(message["lent"])
        more = [f"{after[key] - before[key]} {key}" for key in before if key != "rss" and after[key] > before[key]]
        if self.growth[-1] > RSS_LIMIT:
            more.append(f"{self.growth[-1] >> 20} MiB")
        if more:
            names = ", ".join(message["threads"])
            lives = message["lives"]
            self.leaks.append(f"peer {peer} holds {', '.join(more)} more after {lives} lives; its threads: {names}")
