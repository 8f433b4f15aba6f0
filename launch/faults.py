"""Churn: which faults strike when, and whom; planned ahead from a seed so that a run can be played again.

`parse` reads `--churn`, `draw` makes a schedule for `--churn-rate`, `plan` gives each fault its victim by playing the
schedule through. Pure functions; `launch.supervisor` carries the plan out.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from collectives.errors import UsageError

FaultKind = Literal["kill", "stop", "join", "leave", "coordinator"]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
_EXAMPLE = 'for example "kill@12,stop@20:1,join@25,coordinator@30"'
_MOST_SKIPS = 4
"""A step of the training job has about this many all-reduces."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault as asked for: `kind` strikes when the first peer reports `step`; `target` is a peer's number or None.

    kill: SIGKILL in the middle of an all-reduce. stop: SIGSTOP past the heartbeat timeout, then SIGCONT. join: a fresh
    peer. leave: the peer departs in order. coordinator: SIGKILL of the coordinator, which is then started again.
    """

    kind: FaultKind
    step: int
    target: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}" + (f":{self.target}" if self.target is not None else "")


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault with its victim: `slot` is the peer's number (None: the coordinator), `point` where a kill lands.

    A kill lets the point pass `skip` times first, so that it strikes different operations of a step.

    The slot of a join is the number of the peer that comes: a new one, or under a launcher one that was killed before.
    """

    index: int
    kind: FaultKind
    step: int
    slot: int | None
    point: str | None = None
    skip: int = 0

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}" + (f" of peer {self.slot}" if self.slot is not None else "")


def parse(text: str) -> tuple[Fault, ...]:
    """Read `KIND@STEP[:PEER],...`; the result is in order of steps, equal steps in the order given.

    Raises:
        UsageError: an item that cannot be read.

    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    return tuple(sorted((_item(item) for item in items), key=lambda fault: fault.step))


def draw(
    rate: float, peers: int, steps: int, seed: int, revive: bool = False, *, coordinator: bool = True
) -> tuple[Fault, ...]:
    """Draw a schedule of `rate` faults per 100 steps on average, which keeps near `peers` peers alive.

    Below `peers` living peers a join is twice as likely as a loss; a loss never leaves fewer than two. The first and
    the last tenth of the run stay quiet, so that everybody is in and the last joiner has time to work. `revive`: only
    as many joins as peers are down. `coordinator`: whether it may be struck too.

    Raises:
        UsageError: the rate is not between 0 and 100.

    """
    if not 0 <= rate <= 100:
        raise UsageError(f"--churn-rate is in faults per 100 steps, from 0 to 100, not {rate:g}")
    source = random.Random(f"churn rate {seed}")
    quiet = max(1, steps // 10)
    chosen: list[Fault] = []
    living, down = peers, 0
    for step in range(quiet, steps - quiet):
        if source.random() * 100 >= rate * steps / max(1, steps - 2 * quiet):
            continue
        weights: dict[FaultKind, int] = {"coordinator": 1} if coordinator else {}
        if living > 2:
            weights |= {"kill": 4, "stop": 2}
        if living < peers and (down or not revive):
            weights["join"] = 12
        if not weights:
            continue
        kind = source.choices(list(weights), list(weights.values()))[0]
        living += {"kill": -1, "join": 1}.get(kind, 0)
        down += {"kill": 1, "join": -1}.get(kind, 0)
        chosen.append(Fault(kind, step))
    return tuple(chosen)


def plan(
    faults: Sequence[Fault], peers: int, steps: int, seed: int, *, points: Sequence[str], revive: bool = False
) -> tuple[Planned, ...]:
    """Choose every fault's victim among the peers that live at its step, by the seed.

    A stopped peer counts as absent for the other faults of its own step, and as back afterwards (the supervisor waits
    for it). `points` are the places within an all-reduce where a kill may land. `revive`: a join brings a killed
    peer back in its own slot (a launcher's processes are fixed) instead of starting one with a new number.

    Raises:
        UsageError: a step outside the run, a target that is not alive then, nobody left, or nobody to bring back.

    """
    source = random.Random(f"victims {seed}")
    living, down, count = list(range(peers)), list[int](), peers
    stopped: set[int] = set()
    stopped_at = 0
    planned: list[Planned] = []
    for index, fault in enumerate(faults):
        if not 1 <= fault.step < steps:
            raise UsageError(f"{fault} cannot strike: the run has steps 1 to {steps}, and the last one ends it")
        if fault.step != stopped_at:
            stopped, stopped_at = set(), fault.step
        slot: int | None
        # Drawn for every fault, so that one fault's kind does not shift the next one's.
        point, skip = source.choice(points), source.randrange(_MOST_SKIPS + 1)
        if fault.kind == "coordinator":
            slot = None
        elif fault.kind == "join":
            slot = _newcomer(fault, down, count, source, revive)
            count += 0 if revive else 1
            living.append(slot)
        else:
            slot = _victim(fault, [number for number in living if number not in stopped], source)
            if fault.kind == "stop":
                stopped.add(slot)
            else:
                living.remove(slot)
                down += [slot] if fault.kind == "kill" else []
        where = (point, skip) if fault.kind == "kill" else (None, 0)
        planned.append(Planned(index, fault.kind, fault.step, slot, *where))
    return tuple(planned)


def _item(item: str) -> Fault:
    kind, at, where = item.partition("@")
    step, colon, target = where.partition(":")
    if kind not in KINDS or not at or not step.isdecimal() or (colon and not target.isdecimal()):
        raise UsageError(
            f"--churn item {item!r} is not KIND@STEP[:PEER] with KIND one of {', '.join(KINDS)}; {_EXAMPLE}"
        )
    if target and kind == "coordinator":
        raise UsageError(f"--churn item {item!r}: there is one coordinator, it takes no peer number; {_EXAMPLE}")
    return Fault(kind, int(step), int(target) if target else None)


def _newcomer(fault: Fault, down: list[int], count: int, source: random.Random, revive: bool) -> int:
    if not revive:
        if fault.target not in (None, count):
            raise UsageError(f"{fault}: the next peer to join has the number {count}")
        return count
    candidates = down if fault.target is None else [number for number in down if number == fault.target]
    if not candidates:
        raise UsageError(f"{fault}: under a launcher a join brings a killed peer back, and none is down at that step")
    slot = source.choice(candidates)
    down.remove(slot)
    return slot


def _victim(fault: Fault, present: list[int], source: random.Random) -> int:
    if fault.target is not None and fault.target not in present:
        raise UsageError(f"{fault}: peer {fault.target} is not there at that step; present are {_names(present)}")
    if len(present) < 2:
        raise UsageError(
            f"{fault} would leave nobody to go on (present then: {_names(present)}); drop it or join before"
        )
    return source.choice(present) if fault.target is None else fault.target


def _names(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers)) or "none"
