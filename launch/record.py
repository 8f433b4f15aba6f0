"""What a supervisor saw of a run: its peers, the faults it injected, and a log of every event.

Filled in by `launch.supervisor`, judged by `launch.verdict`, read again by reports (OUT/run.jsonl).
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from collectives.errors import CorruptFile
from launch.faults import Planned

State = Literal["starting", "spare", "warm", "joining", "running", "stopped", "returning", "ended"]
Entry = dict[str, Any]
"""One line of the run's log: `time` (seconds since the epoch, UTC), `source` (who said it), `type`, and its fields."""
_LONGEST_LINE = 64 << 20
Observer = Callable[[Entry], None]


@dataclass(slots=True)
class PeerRecord:
    """One life of a peer: a process, from its start to its end. `slot` is the peer's number."""

    name: str
    slot: int
    pid: int
    state: State = "starting"
    members: list[int] = field(default_factory=list)
    """Its member ids, in order: a peer that was evicted and came back has several."""
    step: int = 0
    loss: float | None = None
    planned_end: str = ""
    """"kill" or "leave" where the schedule ends this life, "late" where it came when the run was over."""
    code: int | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    tail: str = ""


@dataclass(slots=True)
class FaultRecord:
    """A planned fault and what came of it; times in seconds since the epoch."""

    planned: Planned
    peer: str = ""
    member: int | None = None
    """The victim's member id when the fault struck."""
    injected: float | None = None
    fired: float | None = None
    """When the fault was seen to have struck; None: it never did."""
    detail: str = ""
    ended: float | None = None
    """stop: the peer is a member again; join: it is a member; coordinator: it listens again."""


@dataclass(slots=True)
class RunRecord:
    """All that one supervisor knows of its part of the run."""

    peers: list[PeerRecord] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    coordinator_deaths: int = 0
    """Ends of the coordinator that no fault explains."""
    coordinator_error: dict[str, Any] | None = None
    signal: int = 0
    """The signal that ended the run, 0 if none did."""
    timeout: str = ""
    """What took too long, empty if nothing did."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RunRecord":
        """Read what `to_json` gave."""
        return msgspec.convert(value, cls)

    def merge(self, other: "RunRecord") -> None:
        """Take in the part of the run that another supervisor saw."""
        self.peers += other.peers
        self.faults += other.faults
        self.coordinator_deaths += other.coordinator_deaths
        self.timeout = self.timeout or other.timeout
        self.coordinator_error = self.coordinator_error or other.coordinator_error


class RunLog:
    """OUT/run.jsonl of `train`, `demo` and `churn`: one JSON object a line, written as it happens.

    Every line has `time` (seconds since 1970), `source` and `type`. Sources are "supervisor", "coordinator" and peers,
    "peer-3", or "peer-3.1" for the second process of a slot. Types, with what else the line has:

    - supervisor: `run` (first; command, seed, replay: the words that run it again), `started` (peer, pid, spare),
      `fault` (fault: its number, what, peer; step in a training run, aim in churn), `struck` (churn: what, peer, at:
      when a fault that was sent before struck), `woken` (peer), `rate` (churn: each second, operations that members
      finished and members at work), `signal`, `timeout`, `verdict` (last; passed; training: checks, first_step, losses,
      reference; churn: report);
    - peers: `joined` (member, epoch), `event` (of the membership: event is fenced, epoch with members, lost and joined,
      ready, recovered, evicted or left), `evicted`, `left`, `exit` or `gone` (code), `error` or `failed`, `synced`;
      training: `progress` (step, loss), `eval`, `checkpoint` (step, url), `traffic` (to: bytes by member), `fired`
      (a kill is about to strike), `done`; churn: `saved`, `held`, `flipped`, `leaving`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def __call__(self, entry: Entry) -> None:
        """Append one entry."""
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[Entry]:
    """Return the entries of a run's log, by time. The last line may be half a one: the run goes on, or was cut off.

    Raises:
        OSError: the file cannot be read.
        CorruptFile: it is no log.

    """
    entries = []
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_LONGEST_LINE)
            if not line:
                break
            try:
                entries.append(_entry(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                if number > 1 and not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                    break
                raise CorruptFile(
                    f"line {number} of {path} is no entry of a run's log; name the run.jsonl of a run"
                ) from None
    return sorted(entries, key=lambda entry: float(entry["time"]))


def _entry(line: bytes) -> Entry:
    value: Entry = json.loads(line)
    if not math.isfinite(float(value["time"])) or not isinstance(value["source"] + value["type"], str):
        raise ValueError
    return value


def entry(source: str, kind: str, **fields: Any) -> Entry:
    """Make a log entry of now."""
    return {"time": time.time(), "source": source, "type": kind, **fields}
