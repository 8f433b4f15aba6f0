"""Fault points inside operations: a test or a churn schedule arms one, the next operation that passes it fires it.

The points an operation passes, in order: "enter" (nothing sent yet), "begin" (descriptors agree), "transfer" and
"reduce" (once per segment that arrived, that was reduced), "end" (the result is whole), "staged" (and recorded as
such), "confirmed" (complete here), "copied" (the caller's memory is written). The engine passes those from "begin" to
"end". Nothing armed costs one look at an empty list per operation.

And damage on the wire: `damage` has one bit of the next frame flipped, behind the computation of its checksum, as a
faulty network would. Nothing armed costs one look at an empty list per frame.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from collectives.errors import UsageError

POINTS = ("enter", "begin", "transfer", "reduce", "end", "staged", "confirmed", "copied")

Action = Callable[[str], None]


@dataclass(slots=True)
class _Armed:
    point: str
    action: Action
    kind: str
    skip: int


@dataclass(slots=True)
class _Damage:
    what: str
    place: float
    action: Action
    least: int


_lock = threading.Lock()
_armed: list[_Armed] = []
observers: list[Action] = []
"""Called with the description of a point that is about to fire."""
damages: "list[_Damage]" = []
"""What waits for a frame to damage; empty but in tests and in the churn lab."""


def arm(point: str, action: Action, kind: str = "all_reduce", skip: int = 0) -> None:
    """Call `action(description)` when the next operation of `kind` passes `point`; once.

    Args:
        point: one of `POINTS`.
        action: for instance one that ends this process by SIGKILL; it gets a text such as "reduce of all_reduce 17".
        kind: kind of operation; empty: any.
        skip: how many passings to let go by first (points in the engine are passed once per segment).

    Raises:
        UsageError: no such point.

    """
    if point not in POINTS:
        raise UsageError(f"there is no fault point {point!r}; the points are {', '.join(POINTS)}")
    with _lock:
        _armed.append(_Armed(point, action, kind, skip))


def disarm() -> int:
    """Forget what has not fired; returns how many those were."""
    with _lock:
        count = len(_armed)
        _armed.clear()
    return count


def damage(what: str, place: float, action: Action = lambda what: None, least: int = 0) -> None:
    """Flip one bit of the next frame of a kind that this process sends; once.

    Args:
        what: "data", a frame between members, or "control", one to or from the coordinator.
        place: of the byte in its frame, from 0 to 1.
        action: called with `what` when it has been done.
        least: let frames of fewer bytes go by.

    """
    with _lock:
        damages.append(_Damage(what, place, action, least))


def damaged(what: str, frame: bytes) -> bytes:
    """Return what becomes of a frame that is about to be sent; called only where `damages` holds something."""
    with _lock:
        found = next((one for one in damages if one.what == what and len(frame) >= max(1, one.least)), None)
        if found is None:
            return frame
        damages.remove(found)
    spoilt = bytearray(frame)
    spoilt[min(len(spoilt) - 1, int(found.place * len(spoilt)))] ^= 0x10
    found.action(what)
    return bytes(spoilt)


def probe(kind: str, seq: int) -> Callable[[str], None] | None:
    """Return what operation `seq` of `kind` calls at its points, or None where nothing is armed."""
    if not _armed:
        return None

    def passing(point: str) -> None:
        action = _take(point, kind)
        if action is not None:
            for observer in observers:
                observer(f"{point} of {kind} {seq}")
            action(f"{point} of {kind} {seq}")

    return passing


def _take(point: str, kind: str) -> Action | None:
    with _lock:
        for fault in _armed:
            if fault.point == point and fault.kind in ("", kind):
                if fault.skip == 0:
                    _armed.remove(fault)
                    return fault.action
                fault.skip -= 1
    return None
