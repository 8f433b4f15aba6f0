"""Makes a failing history small and prints it as a test case. Called by `simulation.play` when a rule was broken."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tests.membership.history import History
from tests.membership.world import World

MOST_TRIES = 400
"""Histories that are played to make one smaller."""


def failure(history: History) -> Exception | None:
    """Play a copy of a history and tell how it fails, None if it holds."""
    try:
        World(deepcopy(history)).play()
    except Exception as error:
        return error
    return None


def shrink(history: History, fails: Callable[[History], bool], most: int = MOST_TRIES) -> History:
    """Take away what is not needed for a history to fail, until nothing more can be, or `most` have been played."""
    tries = 0
    found = True
    while found and tries < most:
        found = False
        for smaller in _smaller(history):
            tries += 1
            if fails(smaller):
                history, found = smaller, True
                break
            if tries >= most:
                break
    return history


def _smaller(history: History) -> Iterator[History]:
    """Histories with one thing less, the largest things first."""
    for faults in _without_one(history.faults):
        yield replace(history, faults=faults)
    for teams in _without_one(history.teams):
        yield replace(history, teams=teams)
    if len(history.arrivals) > history.founders:
        yield replace(history, arrivals=history.arrivals[:-1], faults=_at_most(history, len(history.arrivals) - 1))
    elif history.founders > 1 and not history.teams:
        fewer = history.founders - 1
        options = replace(history.options, founders=fewer, min_members=min(fewer, history.options.min_members))
        yield replace(history, options=options, arrivals=history.arrivals[:fewer], faults=_at_most(history, fewer))
    if history.side and not any(spec.cross for spec in history.program):
        yield replace(history, side=[], program=[replace(spec, side_until=0) for spec in history.program])
    yield from _shorter(history)
    for key in history.deviations:
        yield replace(history, deviations={k: v for k, v in history.deviations.items() if k != key})
    for name in ("replay", "codec", "leaves", "rejoins", "crosses", "drowsy"):
        if getattr(history, name):
            less: Any = {name: False}
            yield replace(history, **less)
    if history.repeats:
        yield replace(history, repeats=0.0)
    if history.preempt:
        yield replace(history, preempt=0.0)
    if history.think:
        yield replace(history, think=0.0)


def _shorter(history: History) -> Iterator[History]:
    """One operation less; deviations and sub-groups count operations, so with these only the last one goes."""
    program = history.program
    counted = history.deviations or history.teams or any(spec.side_until for spec in program)
    for at in reversed(range(len(program))):
        if len(program) > 1 and (not counted or at == len(program) - 1):
            yield replace(history, program=program[:at] + program[at + 1 :])


def _without_one(items: Sequence[Any]) -> Iterator[list[Any]]:
    for at in range(len(items)):
        yield [*items[:at], *items[at + 1 :]]


def _at_most(history: History, hosts: int) -> list[Any]:
    """The faults, with hosts that are there."""
    return [
        replace(f, where=min(f.where, hosts - 1), other=f.other if f.what == "stranger" else min(f.other, hosts - 1))
        for f in history.faults
    ]


def as_test(history: History) -> str:
    """Write a history as a test case; what is as it is by default is left out."""
    return (
        "from math import inf\n\n"
        "from collectives.options import Options\n"
        "from tests.membership.history import Fault, History, Spec, Team\n"
        "from tests.membership.world import World\n\n\n"
        f"def test_history_of_seed_{history.seed}() -> None:\n"
        f"    history = {_text(history, '    ')}\n"
        "    World(history).play()\n"
    )


def _text(value: Any, indent: str) -> str:
    inner = indent + "    "
    if is_dataclass(value):
        rows = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != _default(f)]
        return _listed(f"{type(value).__name__}(", [f"{name}={_text(v, inner)}" for name, v in rows], ")", indent)
    if isinstance(value, list):
        return _listed("[", [_text(item, inner) for item in value], "]", indent)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return repr(value)


def _default(field: Any) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _listed(start: str, items: list[str], end: str, indent: str) -> str:
    line = start + ", ".join(items) + end
    if len(line) + len(indent) < 90 and "\n" not in line:
        return line
    return "\n".join([start, *(f"{indent}    {item}," for item in items), indent + end])
