"""What happened in a run, from its log: who was there when, what struck, what it took to go on. For `launch.report`.

`tell` reads the entries of `run.jsonl` of `ringhold train`, `demo` and `churn` alike, in one pass and in order of time;
entries that it does not know are passed over. Times are in seconds from the first entry on.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.record import Entry

ENDS = ("exit", "gone")
KINDS = ("kill", "stop", "leave", "join", "coordinator", "partition", "slow", "corrupt")
"""Of faults."""
_AWAY = {"stop": "stopped", "partition": "cut off", "coordinator": "stopped"}
"""States that faults put their victims into."""
_STATES = {"ready": "waiting", "evicted": "joining", "synced": "alive"}
"""By what a peer says."""
_SAID_BY_VICTIMS = {"fired": "kill", "flipped": "corrupt", "leaving": "leave"}
"""Faults, by what their victims say when they strike."""
_LOSSES = ("kill", "stop", "leave", "partition", "corrupt", "slow")
"""Faults that may cost a member its place."""
_COMPLAINTS = 20
_LATE = 0.5
"""Seconds that a death may be seen after the members have seen it."""


@dataclass(slots=True)
class Span:
    """A state of a peer: starting, waiting (to be let join), joining, healing (it gets the state), alive, stopped, or
    cut off."""

    state: str
    start: float
    stop: float


@dataclass(slots=True)
class Life:
    """A peer's process from its start to its end."""

    name: str
    spans: list[Span]
    members: list[int] = field(default_factory=list)
    ended: str = ""
    """How: dead, left, done; empty: it was there to the end of the log."""

    @property
    def start(self) -> float:
        """When it began."""
        return self.spans[0].start

    @property
    def stop(self) -> float:
        """When it ended."""
        return self.spans[-1].stop


@dataclass(slots=True)
class Mark:
    """A fault. `at`: when it struck; where the log does not tell, when it was sent."""

    at: float
    kind: str
    peer: str
    detail: str
    life: Life | None = None
    """What it struck."""
    sure: bool = False
    """Whether `at` is known."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What followed the loss of members, in seconds: from the first survivor's fence on, or from the fault on."""

    at: float
    kind: str
    """Of the fault; "several" if different ones struck members that were lost together, "loss" if none is known."""
    label: str
    detect: float
    reform: float
    first: float

    @property
    def total(self) -> float:
        """From the fault to the first good operation of the last survivor."""
        return self.detect + self.reform + self.first


@dataclass(slots=True)
class Story:
    """A run."""

    command: str = ""
    replay: str = ""
    seed: int | None = None
    began: float = 0.0
    """Of the first entry: seconds since 1970."""
    seconds: float = 0.0
    lives: list[Life] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    world: list[tuple[float, int]] = field(default_factory=list)
    """Number of members from that time on."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    reference: list[tuple[int, float]] = field(default_factory=list)
    progress: list[tuple[float, float]] = field(default_factory=list)
    """Work done in all by that time: steps, or operations."""
    unit: str = "steps"
    recoveries: list[Recovery] = field(default_factory=list)
    traffic: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Bytes by (sender, receiver)."""
    passed: bool | None = None
    """None: the log ends without a verdict."""
    checks: list[tuple[str, bool, str]] = field(default_factory=list)


def tell(log: Sequence[Entry]) -> Story:
    """Read a log."""
    teller = _Teller(float(log[0]["time"]) if log else 0.0)
    for entry in log:
        teller.take(entry)
    return teller.end()


@dataclass(slots=True)
class _Change:
    """Of the membership."""

    began: float = math.inf
    lost: list[int] = field(default_factory=list)
    there: set[str] = field(default_factory=set)


class _Teller:
    def __init__(self, began: float) -> None:
        self.story = Story(began=began)
        self._living: dict[str, Life] = {}
        self._epoch = self._done = 0
        self._now = 0.0
        self._unnamed: Mark | None = None
        """A fault that strikes a peer which has not been started yet."""
        self._marks: dict[str, list[Mark]] = {}
        self._joined: dict[int, tuple[str, float]] = {}
        """Whose a member was, and since when."""
        self._changes: dict[int, _Change] = {}
        self._reached: dict[str, dict[str, list[tuple[int, float]]]] = {"epoch": {}, "recovered": {}}
        """By event and peer: when it came to which epoch."""

    def take(self, entry: Entry) -> None:
        """Take one entry."""
        if entry["type"] == "verdict":  # which may come long after the run's end
            self._verdict(entry)
            return
        self._now = float(entry["time"]) - self.story.began
        source, kind = entry["source"], entry["type"]
        match kind:
            case "run":
                self.story.command, self.story.seed = entry["command"], entry.get("seed")
                self.story.replay = entry.get("replay", "")
            case "started":
                self._started(entry["peer"])
            case "listening":
                self._enter("coordinator", "alive")
            case "ready" | "evicted" | "synced":
                self._enter(source, _STATES[kind])
            case "joined":
                self._enter(source, "healing")
                self._living[source].members.append(entry["member"])
                self._joined[entry["member"]] = (source, self._now)
            case "fault":
                self._strike(entry)
            case "struck":
                self._struck(entry["peer"], entry["what"], float(entry["at"]) - self.story.began)
            case "fired" | "flipped" | "leaving":
                self._struck(source, _SAID_BY_VICTIMS[kind], self._now)
            case "woken":
                self._enter(entry["peer"], "alive" if entry["peer"] == "coordinator" else "joining")
            case "left" | "done":
                self._finish(source, kind)
            case "exit" | "gone":
                self._ended(source, entry["code"])
            case "event":
                self._event(source, entry)
            case "progress":
                self._progress(entry)
            case "rate":
                self.story.unit = "operations"  # of each member
                self._done += entry["operations"]
                self.story.progress.append((self._now, self._done))
            case "traffic":
                for receiver, count in entry["to"].items():
                    self.story.traffic[int(entry["member"]), int(receiver)] += int(count)

    def end(self) -> Story:
        """The story, whole."""
        story = self.story
        story.seconds = self._now
        for life in self._living.values():
            life.spans[-1].stop = self._now
        story.recoveries += self._recoveries()
        story.recoveries.sort(key=lambda one: one.at)
        return story

    def _started(self, peer: str) -> None:
        self._start(peer)
        if self._unnamed is not None:
            self._unnamed.peer, self._unnamed.life = peer, self._living[peer]
            self._marks.setdefault(peer, []).append(self._unnamed)
            self._unnamed = None

    def _ended(self, peer: str, code: int) -> None:
        self._finish(peer, "dead" if code else "left")
        if code and not any(mark.sure for mark in self._marks.get(peer, ())):
            self._struck(peer, "kill", self._now)

    def _start(self, peer: str) -> None:
        if peer not in self._living:
            # A coordinator of which nothing was told yet was there before.
            unseen = peer == "coordinator" and all(life.name != peer for life in self.story.lives)
            state, start = ("alive", 0.0) if unseen and self._now > 1 else ("starting", self._now)
            self._living[peer] = Life(peer, [Span(state, start, self._now)])
            self.story.lives.append(self._living[peer])

    def _enter(self, peer: str, state: str) -> None:
        self._start(peer)
        life = self._living[peer]
        if life.spans[-1].state != state:
            life.spans[-1].stop = self._now
            life.spans.append(Span(state, self._now, self._now))

    def _finish(self, peer: str, how: str) -> None:
        life = self._living.pop(peer, None)
        if life is not None:
            life.spans[-1].stop, life.ended = self._now, how

    def _strike(self, entry: Entry) -> None:
        kind = entry["what"]
        peer = "coordinator" if kind == "coordinator" else entry["peer"]
        detail = entry.get("aim") or (f"step {entry['step']}" if "step" in entry else "")
        mark = Mark(self._now, kind, peer, detail, self._living.get(peer))
        self.story.marks.append(mark)
        if not peer:
            self._unnamed = mark
            return
        self._marks.setdefault(peer, []).append(mark)
        if kind == "coordinator" and self.story.command != "churn":
            self._finish("coordinator", "dead")
        elif away := _AWAY.get(kind):
            self._enter(peer, away)
            mark.life = self._living[peer]

    def _struck(self, peer: str, kind: str, at: float) -> None:
        """A fault that was sent struck at this time."""
        for mark in reversed(self._marks.get(peer, ())):
            if mark.kind == kind:
                away, life = _AWAY.get(kind), mark.life
                if away and life is not None and peer in self._living:
                    if life.spans[-1].state != away:
                        self._enter(peer, away)
                    if len(life.spans) > 1:
                        life.spans[-1].start = life.spans[-2].stop = max(at, life.spans[-2].start)
                mark.at, mark.sure = at, True
                break

    def _event(self, source: str, entry: Entry) -> None:
        name, epoch = entry["event"], entry.get("epoch", 0)
        if name == "epoch" and epoch > self._epoch:
            self._epoch = epoch
            self.story.world.append((self._now, len(entry["members"])))
        if not epoch or name not in ("fenced", "epoch", "recovered"):
            return
        change = self._changes.setdefault(epoch, _Change())
        if epoch >= self._epoch:  # who tells of an epoch that is over was stopped meanwhile
            change.began = min(change.began, self._now)
            change.there.add(source)
        if name == "epoch":
            change.lost = entry["lost"]
        if name != "fenced":
            self._reached[name].setdefault(source, []).append((epoch, self._now))

    def _progress(self, entry: Entry) -> None:
        if entry["step"] > self._done:
            self._done = entry["step"]
            self.story.progress.append((self._now, self._done))
            if entry.get("loss") is not None:
                self.story.losses.append((self._done, entry["loss"]))

    def _verdict(self, entry: Entry) -> None:
        self.story.passed = bool(entry["passed"])
        self.story.checks = [(c["name"], bool(c["ok"]), c["detail"]) for c in entry.get("checks", ())]
        if "report" in entry:
            self.story.checks += _figures(entry["report"])
        first = int(entry.get("first_step", 0))
        for name, into in (("losses", self.story.losses), ("reference", self.story.reference)):
            if values := entry.get(name):
                into[:] = [(first + number + 1, value) for number, value in enumerate(values)]

    def _recoveries(self) -> list[Recovery]:
        """Of every change that lost somebody: when the fault struck is known by the peer, else by the first fence.

        Survivors of a change that another one overtook are over it when they are over that one.
        """
        found = []
        for number, change in self._changes.items():
            if not change.lost:
                continue
            fence = change.began
            lost, marks = [], []
            for member in change.lost:
                peer, since = self._joined.get(member, (f"member {member}", 0.0))
                lost.append(peer)
                fits = [m for m in self._marks.get(peer, ()) if since <= m.at <= fence + _LATE and m.kind in _LOSSES]
                marks += sorted(fits, key=lambda mark: mark.at)[-1:]
            struck = min(max((mark.at for mark in marks), default=fence), fence)
            kinds = [*dict.fromkeys(mark.kind for mark in marks)]
            survivors = change.there.difference(lost)
            formed = max([fence, *self._times("epoch", survivors, number, struck)])
            done = max([formed, *self._times("recovered", survivors, number, struck)])
            found.append(
                Recovery(
                    struck,
                    "several" if len(kinds) > 1 else "".join(kinds) or "loss",
                    f"{' and '.join(kinds) or 'loss'} of {', '.join(lost)}",
                    fence - struck,
                    formed - fence,
                    done - formed,
                )
            )
        return found

    def _times(self, what: str, survivors: Iterable[str], epoch: int, since: float) -> Iterator[float]:
        """When each of them first came to it in this epoch or a later one, unless it was struck itself before."""
        for peer in survivors:
            at = next((at for number, at in self._reached[what].get(peer, ()) if number >= epoch), None)
            if at is not None and not any(m.kind in _LOSSES and since < m.at < at for m in self._marks.get(peer, ())):
                yield at


def _figures(report: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """The judgements of the churn lab as checks."""
    faults = report.get("faults", {})
    fired, planned = (sum(one[what] for one in faults.values()) for what in ("fired", "planned"))
    missed = f"; {planned - fired} found their victims gone, or the run over" if fired < planned else ""
    rows = [("faults", bool(fired or not planned), f"{fired:,} of {planned:,} planned faults struck{missed}")]
    for name in ("wrong", "hangs", "leaks"):
        rows.append(
            (name, not report.get(name), f"{report.get(name, 0)} in {report.get('operations', 0):,} operations")
        )
    if "false_evictions" in report:
        rows.append(("false evictions", True, str(report["false_evictions"])))
    rows += [("left out", True, f"{kind}: {why}") for kind, why in report.get("left_out", {}).items()]
    rows += [("complaint", False, str(text)) for text in report.get("complaints", ())[:_COMPLAINTS]]
    return rows
