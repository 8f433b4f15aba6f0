"""Fault points inside operations: a test or a churn schedule arms one, the next operation that passes it fires it.

The points an operation passes, in order: "enter" (nothing sent yet), "begin" (descriptors agree), "transfer" and
"reduce" (once per segment that arrived, that was reduced), "end" (the result is whole), "staged" (and recorded as
such), "confirmed" (complete here), "copied" (the caller's memory is written). The engine passes those from "begin" to
"end". Nothing armed costs one look at an empty list per operation.
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


_lock = threading.Lock()
_armed: list[_Armed] = []
observers: list[Action] = []
"""Called with the description of a point that is about to fire."""


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
