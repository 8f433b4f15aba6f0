"""What a run does right now, as rows: for `ringhold top`, and for the coordinator's page and metrics (`live_page`)."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from collectives.membership.protocol import Status

HEADINGS = ("member", "rank", "state", "heard", "lane", "operation", "phase", "waits for", "a second")


@dataclass(frozen=True, slots=True)
class Row:
    """One lane of one peer; a peer without lanes has one row of no lane. Times in seconds."""

    member: int
    rank: int | None
    """None: not in the epoch."""
    state: str
    age: float
    """Since it was last heard."""
    lane: str = ""
    kind: str = ""
    seq: int = 0
    phase: str = ""
    seconds: float = 0.0
    """In this phase."""
    waiting_for: int = 0
    """A member; 0: nobody."""
    rate: float | None = None
    """Operations a second, once that is known."""

    def cells(self) -> tuple[str, ...]:
        """As text, under `HEADINGS`."""
        return (
            str(self.member),
            "-" if self.rank is None else str(self.rank),
            self.state,
            f"{self.age:.1f} s ago",
            self.lane or "-",
            f"{self.kind} {self.seq}" if self.lane else "-",
            f"{self.phase} for {self.seconds:.1f} s" if self.lane else "-",
            f"member {self.waiting_for}" if self.waiting_for else "-",
            "-" if self.rate is None else f"{self.rate:.1f}",
        )


@dataclass(frozen=True, slots=True)
class Vitals:
    """A run at an instant."""

    run: str
    epoch: int
    change: int
    """Number of the epoch that is being formed, 0 if none is."""
    waiting: int
    rows: tuple[Row, ...]

    @property
    def members(self) -> int:
        """How many are in the epoch."""
        return len({row.member for row in self.rows if row.rank is not None})

    def headline(self) -> str:
        """The run in one line."""
        change = f", changing to epoch {self.change}" if self.change else ""
        return f"run {self.run!r}: epoch {self.epoch}{change}, {self.members} members, {self.waiting} waiting"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Watch:
    """Turns one status after the other into vitals; rates are over the last `window` seconds. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: float = 2.0) -> None:
        self._clock, self._window = clock, window
        self._seen: dict[tuple[int, str], list[tuple[float, int]]] = {}

    def look(self, status: Status) -> Vitals:
        """Take the next status."""
        now = self._clock()
        rows: list[Row] = []
        for one in status.members:
            rank = one.rank if one.rank >= 0 else None
            common = (one.member, rank, one.state, one.age)
            rows += [
                Row(
                    *common,
                    lane.lane,
                    lane.kind,
                    lane.seq,
                    lane.phase,
                    lane.seconds,
                    lane.waiting_for,
                    self._rate(one.member, lane.lane, lane.seq, now),
                )
                for lane in one.lanes
            ] or [Row(*common)]
        current = {(row.member, row.lane) for row in rows}
        self._seen = {key: history for key, history in self._seen.items() if key in current}
        return Vitals(status.run, status.epoch, status.change, status.waiting, tuple(rows))

    def _rate(self, member: int, lane: str, seq: int, now: float) -> float | None:
        history = self._seen.setdefault((member, lane), [])
        history.append((now, seq))
        while len(history) > 2 and history[1][0] < now - self._window:
            history.pop(0)
        (then, first), (last, newest) = history[0], history[-1]
        return (newest - first) / (last - then) if last > then else None
