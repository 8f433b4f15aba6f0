"""What happened in a run, from its log: who was there when, what struck, what it took to go on. For `launch.report`.

`tell` reads the entries of `run.jsonl` of `ringhold train`, `demo` and `churn` alike, in one pass and in order of time;
entries that it does not know are passed over. Times are in seconds from the first entry on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.record import Entry

ENDS = ("exit", "gone")
KINDS = ("kill", "stop", "leave", "join", "coordinator", "partition", "slow", "corrupt")
"""Of faults."""


@dataclass(slots=True)
class Span:
    """A state of a peer: starting, waiting (to be let join), joining, healing (it gets the state), alive, stopped."""

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


@dataclass(frozen=True, slots=True)
class Mark:
    """A fault."""

    at: float
    kind: str
    peer: str
    detail: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """What followed the loss of members, in seconds: from the first survivor's fence on, or from the fault on."""

    at: float
    label: str
    detect: float
    reform: float
    first: float


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
    traffic: dict[tuple[int, int], int] = field(default_factory=dict)
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


class _Teller:
    def __init__(self, began: float) -> None:
        self.story = Story(began=began)
        self._living: dict[str, Life] = {}
        self._epoch = self._done = 0
        self._now = 0.0
        self._struck: dict[str, Mark] = {}
        self._changes: dict[int, dict[str, Any]] = {}

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
                self._start(entry["peer"])
            case "listening":
                self._enter("coordinator", "alive")
            case "ready":
                self._enter(source, "waiting")
            case "evicted":
                self._enter(source, "joining")
            case "joined":
                self._enter(source, "healing")
                self._living[source].members.append(entry["member"])
            case "synced":
                self._enter(source, "alive")
            case "fault":
                self._strike(entry)
            case "woken":
                self._enter(entry["peer"], "alive" if entry["peer"] == "coordinator" else "joining")
            case "left" | "done":
                self._finish(source, kind)
            case "exit" | "gone":
                self._finish(source, "dead" if entry["code"] else "left")
            case "event":
                self._event(source, entry)
            case "progress":
                self._progress(entry)
            case "rate":
                self.story.unit = "operations"
                self._done += entry["operations"]
                self.story.progress.append((self._now, self._done))
            case "traffic":
                for receiver, count in entry["to"].items():
                    pair = (int(entry["member"]), int(receiver))
                    self.story.traffic[pair] = self.story.traffic.get(pair, 0) + int(count)

    def end(self) -> Story:
        """The story, whole."""
        story = self.story
        story.seconds = self._now
        for life in self._living.values():
            life.spans[-1].stop = self._now
        story.recoveries += self._recoveries()
        story.recoveries.sort(key=lambda one: one.at)
        return story

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
        kind, peer = entry["what"], entry["peer"]
        detail = entry.get("aim") or (f"step {entry['step']}" if "step" in entry else "")
        mark = Mark(self._now, kind, "coordinator" if kind == "coordinator" else peer, detail)
        self.story.marks.append(mark)
        self._struck[mark.peer] = mark
        if kind == "stop":
            self._enter(peer, "stopped")
        elif kind == "coordinator" and self.story.command == "churn":
            self._enter("coordinator", "stopped")
        elif kind == "coordinator":
            self._finish("coordinator", "dead")

    def _event(self, source: str, entry: Entry) -> None:
        name, epoch = entry["event"], entry.get("epoch", 0)
        if name == "epoch" and epoch > self._epoch:
            self._epoch = epoch
            self.story.world.append((self._now, len(entry["members"])))
        if name in ("fenced", "epoch", "recovered") and epoch:
            change = self._changes.setdefault(epoch, {"lost": []})
            if name == "epoch":
                change["lost"] = entry["lost"]
            change.setdefault(f"first {name}", self._now)
            change[f"last {name}"] = self._now

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
        """Of every change that lost somebody: when the fault struck is known by the peer, else by the first fence."""
        peers = {member: life.name for life in self.story.lives for member in life.members}
        found = []
        for change in self._changes.values():
            if not change["lost"] or "last epoch" not in change:
                continue
            lost = [peers.get(member, f"member {member}") for member in change["lost"]]
            fence = change.get("first fenced", change["first epoch"])
            marks = [m for m in self.story.marks if m.peer in lost and m.at <= fence + 0.001]
            struck = max((mark.at for mark in marks), default=fence)
            kinds = " and ".join(dict.fromkeys(mark.kind for mark in marks[-len(lost) :])) or "loss"
            formed = max(change["last epoch"], fence)
            done = max(change.get("last recovered", formed), formed)
            found.append(
                Recovery(struck, f"{kinds} of {', '.join(lost)}", fence - struck, formed - fence, done - formed)
            )
        return found


def _figures(report: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """The judgements of the churn lab as checks."""
    faults = report.get("faults", {})
    fired, planned = (sum(one[what] for one in faults.values()) for what in ("fired", "planned"))
    rows = [("faults", fired == planned, f"{fired} of {planned} planned faults struck")]
    for name in ("wrong", "hangs", "leaks"):
        rows.append((name, not report.get(name), f"{report.get(name, 0)} in {report.get('operations', 0)} operations"))
    if "false_evictions" in report:
        rows.append(("false evictions", True, str(report["false_evictions"])))
    return rows
