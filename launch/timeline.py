"""How long detection and recovery took after each fault, from the log of a run. Used for the table of `launch.summary`.

All times are wall-clock stamps of processes on one host.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.record import Entry, FaultRecord


@dataclass(frozen=True, slots=True)
class Recovery:
    """What followed a fault, in seconds after it struck; None where it does not apply or was not seen."""

    fault: str
    peer: str
    detail: str
    at: float
    """When it struck, in seconds after the start of the run."""
    detected: float | None
    """The first survivor had fenced the old epoch."""
    reformed: float | None
    """The last survivor was in the new epoch."""
    recovered: float | None
    """The last survivor had finished its first operation there."""
    back: float | None
    """stop: woken until a member again; join: released until a member; coordinator: killed until it listens again."""
    epoch: int | None
    survivors: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON."""
        return asdict(self)


def recoveries(faults: Iterable[FaultRecord], log: Sequence[Entry]) -> list[Recovery]:
    """Return what followed each fault that struck, in the order in which they did. `log` is sorted by time."""
    began = log[0]["time"] if log else 0.0
    events = [entry for entry in log if entry["type"] == "event"]
    found = [_recovery(fault, events, log, began) for fault in faults if fault.injected is not None]
    return sorted(found, key=lambda recovery: recovery.at)


def _recovery(fault: FaultRecord, events: Sequence[Entry], log: Sequence[Entry], began: float) -> Recovery:
    struck = fault.injected if fault.planned.kind in {"join", "leave"} else fault.fired
    assert fault.injected is not None
    struck = struck if struck is not None else fault.injected
    if fault.planned.kind == "coordinator":
        return Recovery(
            "coordinator",
            fault.peer,
            fault.detail,
            struck - began,
            *(None,) * 3,
            _after(struck, fault.ended),
            None,
            None,
        )
    others = [event for event in events if event["source"] != fault.peer and event["time"] >= struck]
    change = _change(fault, others, log)
    back = _after(_woken(fault, log, struck), fault.ended) if fault.planned.kind in {"stop", "join"} else None
    if change is None:
        return Recovery(
            str(fault.planned.kind), fault.peer, fault.detail, struck - began, *(None,) * 3, back, None, None
        )
    epoch = change["epoch"]
    fenced = [e["time"] for e in others if e["event"] == "fenced" and e["epoch"] <= epoch]
    formed = [e["time"] for e in others if e["event"] == "epoch" and e["epoch"] == epoch]
    working = [e["time"] for e in others if e["event"] == "recovered" and e["epoch"] == epoch]
    return Recovery(
        str(fault.planned.kind),
        fault.peer,
        fault.detail,
        struck - began,
        _after(struck, min(fenced, default=None)),
        _after(struck, max(formed)),
        _after(struck, max(working, default=None)),
        back,
        epoch,
        len(change["members"]) - len(change["joined"]),
    )


def _change(fault: FaultRecord, others: Sequence[Entry], log: Sequence[Entry]) -> Entry | None:
    """Find the first epoch that the others formed without the victim, or with the newcomer."""
    epochs = (event for event in others if event["event"] == "epoch")
    if fault.planned.kind != "join":
        return next((event for event in epochs if fault.member in event["lost"]), None)
    member = next((e["member"] for e in log if e["type"] == "joined" and e["source"] == fault.peer), None)
    return next((event for event in epochs if member in event["joined"]), None)


def _woken(fault: FaultRecord, log: Sequence[Entry], struck: float) -> float:
    wakes = (e["time"] for e in log if e["type"] == "woken" and e["fault"] == fault.planned.index)
    return float(next(wakes, struck))


def _after(begin: float, end: float | None) -> float | None:
    return None if end is None else end - begin
