"""What happens in one simulated history: who takes part, what they call, what goes wrong; drawn from a seed.

`draw` is the only place where a history is decided; `world.World` plays it. All times are in virtual seconds.
"""

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from collectives.options import Options

HEARTBEAT = 1.0
SILENCE = 4.0
PATIENCE = 10.0
"""The operation timeout."""
COORDINATOR = 25.0
JOIN = 60.0

REPEATED = 3
"""Operations that are called once more by a history that is over early."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One operation of the main lane, the same on every member.

    `batch`: issued together with the one before it, so with a view that may be older than the last outcome.
    `side_until`: operations of the side lane that are under way beside it, or complete before it. `cross`: the last
    of them is called by the same thread, just before it.
    """

    kind: str
    on_loss: str = "retry"
    batch: bool = False
    side_until: int = 0
    cross: bool = False


@dataclass(frozen=True, slots=True)
class Team:
    """A sub-group: ranks among the founders, the kinds of its lane's operations, and how many of them are under way
    beside each operation of the main lane, or complete before it.

    `misnamed`: the rank of a founder that means other members by its name, -1: none.
    """

    name: str
    ranks: tuple[int, ...]
    kinds: list[str]
    until: list[int]
    misnamed: int = -1


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong when a point is reached for the `count`-th time, or at a time (`point` empty).

    `what` names a method of `faults.Faults`; `where` the host, -1: the one that reached the point.
    """

    what: str
    point: str = ""
    count: int = 1
    time: float = 0.0
    where: int = -1
    other: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class History:
    """One history; `theme` says which faults it is about."""

    seed: int
    theme: str
    options: Options
    program: list[Spec]
    side: list[str]
    arrivals: list[float]
    faults: list[Fault]
    deviations: dict[tuple[int, int], str] = field(default_factory=dict)
    """(host, main operation) -> what this host does there instead of what the others do."""
    delay: float = 0.05
    control_delay: float = 0.1
    think: float = 0.2
    preempt: float = 0.1
    replay: bool = False
    """Old decisions are announced again on every reconnection."""
    codec: bool = False
    """Control messages pass through their encoding."""
    leaves: bool = False
    """Members leave when their program is at its end."""
    rejoins: bool = False
    """Where a process ends, by a death or an eviction, another is started that joins."""
    crosses: bool = False
    """Somebody calls the operations of two lanes in another order."""
    teams: list[Team] = field(default_factory=list)
    repeats: float = 0.0
    """How often a control message comes once more, later, when newer ones may have overtaken it."""
    drowsy: bool = False
    """Threads may sleep between the failure of a link and what they do about it."""
    once: tuple[list[Spec], list[str], list[tuple[list[str], list[int]]]] | None = None
    """What `repeat` adds: operations of the main lane, the side lane and the sub-groups."""

    @property
    def founders(self) -> int:
        """Members of the first epoch."""
        return self.options.founders

    def repeat(self) -> None:
        """Have everybody let in who waits and call the first operations once more, without deviations."""
        if self.once is None:
            program = self.program[:REPEATED]
            teams = [(team.kinds[: team.until[len(program) - 1]], team.until[:REPEATED]) for team in self.teams]
            self.once = (program, self.side[: program[-1].side_until], teams)
        program, side, teams = self.once
        behind = len(self.side)
        self.program.append(Spec("admit", side_until=behind))
        self.program += [replace(spec, side_until=behind + spec.side_until) for spec in program]
        self.side += side
        for team, (kinds, until) in zip(self.teams, teams, strict=True):
            behind = len(team.kinds)
            team.until.extend([behind, *(behind + number for number in until)])
            team.kinds.extend(kinds)


HOST_POINTS = (
    "enter",
    "verdict",
    "sent",
    "moved",
    "staged",
    "confirming",
    "confirmed",
    "returned",
    "prepared",
    "reported",
    "decided",
    "resumed",
    "admitting",
)
COORDINATOR_POINTS = ("action", "persist", "persisted", "prepare", "announce", "message")

STRANGERS = 5
"""Kinds of strangers (`headquarters.Headquarters.stranger`)."""

THEMES = {
    "calm": 4,
    "loss": 20,
    "coordinator": 14,
    "mixed": 24,
    "join": 14,
    "views": 8,
    "link": 8,
    "silence": 4,
    "stall": 5,
    "mismatch": 8,
    "quorum": 5,
}
_KINDS = ("all_reduce", "all_reduce", "broadcast", "barrier", "shape")


def draw(seed: int) -> History:
    """Decide a history."""
    rng = Random(seed)
    theme = rng.choices(list(THEMES), list(THEMES.values()))[0]
    founders = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5))
    if theme in ("link", "stall", "mismatch", "quorum", "silence"):
        founders = max(2, founders)
    if theme == "views":
        founders = max(3, founders)
    joiners = rng.choice((1, 1, 2)) if theme == "join" else rng.choice((0, 0, 0, 1))
    least = 2 if theme == "quorum" and rng.random() < 0.3 else 1
    options = Options(
        heartbeat=HEARTBEAT,
        heartbeat_timeout=SILENCE,
        op_timeout=PATIENCE,
        coordinator_timeout=COORDINATOR,
        join_timeout=JOIN,
        founders=founders,
        quorum=theme == "quorum" or rng.random() < 0.05,
        min_members=min(least, founders),
    )
    program, side = _program(rng, admits=joiners > 0 or rng.random() < 0.3, views=theme == "views")
    history = History(
        seed=seed,
        theme=theme,
        options=options,
        program=program,
        side=side,
        arrivals=[rng.random() * 0.5 for _ in range(founders)] + [rng.random() * 3 for _ in range(joiners)],
        faults=[],
        delay=rng.choice((0.01, 0.05, 0.05, 0.3)),
        control_delay=rng.choice((0.02, 0.06, 0.06, 0.15)),
        think=rng.choice((0.0, 0.1, 0.1, 0.6)),
        preempt=rng.choice((0.0, 0.1, 0.1, 0.3)),
        replay=rng.random() < 0.1,
        codec=rng.random() < 0.02,
        leaves=rng.random() < 0.2,
        rejoins=rng.random() < 0.15,
    )
    _DRAW[theme](rng, history)
    _draw_teams(Random(seed ^ 0x7EA3), history)
    _draw_more(Random(seed ^ 0x0DD5), history)
    return history


def _program(rng: Random, admits: bool, views: bool) -> tuple[list[Spec], list[str]]:
    """Draw what everybody calls: the main lane's specs, and the kinds of the side lane's operations.

    `views`: mostly operations that end with `MemberLost` if the caller's view is an old one.
    """
    two_lanes = rng.random() < (0.6 if views else 0.25)
    kinds = ("shape", "shape", "broadcast", "barrier") if views else _KINDS
    raising = 0.4 if views else 0.15
    program: list[Spec] = []
    side: list[str] = []
    batch = 0
    for _ in range(rng.randint(3, 9)):
        if admits and rng.random() < 0.35:
            program.append(Spec("admit", side_until=len(side)))
            batch = 0
            continue
        cross = False
        if two_lanes and not batch and rng.random() < 0.5:
            cross = rng.random() < 0.3
            side += [rng.choice(kinds) for _ in range(1 if cross else rng.choice((1, 2)))]
        on_loss = "raise" if rng.random() < raising else "retry"
        program.append(Spec(rng.choice(kinds), on_loss, batch > 0, len(side), cross))
        batch = batch - 1 if batch else (rng.choice((0, 0, 0, 2, 3)))
    return program, side


def _draw_teams(rng: Random, history: History) -> None:
    """Draw sub-groups, which may overlap: for many histories some, for most none."""
    if history.founders < 2 or rng.random() < 0.55:
        return
    for number in range(rng.choice((1, 1, 2, 3))):
        ranks = rng.sample(range(history.founders), rng.randint(min(2, history.founders), history.founders))
        kinds: list[str] = []
        until: list[int] = []
        for _ in history.program:
            kinds += [rng.choice(_KINDS) for _ in range(rng.choice((0, 1, 1, 2)))]
            until.append(len(kinds))
        misnames = history.theme == "mismatch" and rng.random() < 0.5
        history.teams.append(Team(f"team{number}", tuple(ranks), kinds, until, rng.choice(ranks) if misnames else -1))


def _draw_more(rng: Random, history: History) -> None:
    """Draw what may go wrong in a history of any theme beside its own faults."""
    hosts = len(history.arrivals)
    # These points are reached a few times at most.
    seldom = ("resumed", "admitting")
    history.faults = [replace(f, count=1 + f.count % 3) if f.point in seldom else f for f in history.faults]
    if rng.random() < 0.12:
        history.repeats = rng.choice((0.05, 0.2))
    history.drowsy = rng.random() < 0.1
    if rng.random() < 0.05:
        kind = rng.randrange(STRANGERS)
        history.faults.append(Fault("stranger", time=rng.random() * 6, where=rng.randrange(hosts), other=kind))
    if history.theme in ("mixed", "join") and hosts > 1 and rng.random() < 0.2:
        most, seconds = rng.randrange(hosts - 1), rng.choice((1.0, 3.0, 6.0, 15.0, 1e9))
        history.faults.append(Fault("partition", rng.choice(HOST_POINTS), rng.randint(1, 20), 0.0, -1, most, seconds))
    if history.theme == "calm" and rng.random() < 0.3:
        history.faults.append(Fault("old_journal", time=1 + rng.random() * 3))
    if history.theme == "quorum" and history.founders > 2 and rng.random() < 0.4:
        history.options = replace(history.options, quorum=False, min_members=2)
    if history.options.quorum and rng.random() < 0.2:
        history.faults.append(Fault("stop_coordinator", time=1 + rng.random() * 3, seconds=rng.choice((3.0, 6.0))))


def _host_fault(rng: Random, history: History, what: str, seconds: float = 0.0) -> Fault:
    """Draw when a fault strikes: at a point of the protocol most often, at a time else."""
    hosts = len(history.arrivals)
    if rng.random() < 0.15:
        return Fault(what, time=rng.random() * 6, where=rng.randrange(hosts), seconds=seconds)
    where = rng.choice((-1, -1, rng.randrange(hosts)))
    if rng.random() < 0.25:
        return Fault(what, rng.choice(COORDINATOR_POINTS[2:]), rng.randint(1, 30), 0, rng.randrange(hosts), 0, seconds)
    return Fault(what, rng.choice(HOST_POINTS), rng.randint(1, 12 * hosts), 0.0, where, 0, seconds)


def _coordinator_fault(rng: Random) -> Fault:
    seconds = rng.choice((0.1, 0.5, 2.0, 6.0, 9.0))
    what = rng.choice(("crash_coordinator", "crash_coordinator", "stop_coordinator"))
    if rng.random() < 0.15:
        return Fault(what, time=rng.random() * 6, seconds=seconds)
    point = rng.choice(COORDINATOR_POINTS)
    most = {"action": 60, "message": 60}.get(point, 8)
    return Fault(what, point, rng.randint(1, most), seconds=seconds)


def _any_fault(rng: Random, history: History) -> Fault:
    hosts = len(history.arrivals)
    what = rng.choice(
        (
            "crash",
            "crash",
            "vanish",
            "stop",
            "stop",
            "break_link",
            "cut_off",
            "isolate",
            "crash_coordinator",
            "crash_coordinator",
            "cut",
            "quit",
        )
    )
    if what == "crash_coordinator":
        return _coordinator_fault(rng)
    if what == "cut":
        return _cut(rng, hosts)
    seconds = rng.choice((0.3, 2.0, 5.0, 9.0, 14.0)) if what in ("stop", "cut_off") else 0.0
    return _host_fault(rng, history, what, seconds)


def _cut(rng: Random, hosts: int) -> Fault:
    one, other = rng.sample(range(hosts), 2) if hosts > 1 else (0, 0)
    what = rng.choice(("cut_cable", "cut_cable", "cut_once", "cut_silently"))
    point, count = rng.choice(("sent", "staged", "confirming")), rng.randint(1, 4 * hosts)
    return Fault(what, point, count, where=one, other=other)


def _draw_loss(rng: Random, history: History) -> None:
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        history.faults.append(_host_fault(rng, history, rng.choice(("crash", "crash", "vanish"))))
    if rng.random() < 0.2:
        _leave(rng, history)


def _draw_coordinator(rng: Random, history: History) -> None:
    history.faults += [_coordinator_fault(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.4:
        # Some reason for a change.
        what = rng.choice(("cut_once", "crash"))
        if what == "crash":
            history.faults.append(_host_fault(rng, history, "crash"))
        elif len(history.arrivals) > 1:
            one, other = rng.sample(range(len(history.arrivals)), 2)
            history.faults.append(Fault("cut_once", "staged", rng.randint(1, 10), where=one, other=other))


def _draw_mixed(rng: Random, history: History) -> None:
    history.faults += [_any_fault(rng, history) for _ in range(rng.choice((1, 2, 2, 3, 4)))]
    if rng.random() < 0.15:
        _leave(rng, history)


def _draw_join(rng: Random, history: History) -> None:
    history.faults += [_any_fault(rng, history) for _ in range(rng.choice((0, 1, 1, 2)))]


def _draw_link(rng: Random, history: History) -> None:
    hosts = history.founders
    history.faults += [_cut(rng, hosts) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.3:
        history.faults.append(_coordinator_fault(rng))


def _draw_silence(rng: Random, history: History) -> None:
    """Nobody reaches the coordinator for a while, and nothing else is wrong."""
    history.faults.append(
        Fault("cut_all_off", time=1 + rng.random() * 3, seconds=rng.choice((1.0, 3.0, 5.0, 8.0, 12.0)))
    )


def _draw_stall(rng: Random, history: History) -> None:
    host = rng.randrange(history.founders)
    seqs = [n for n, spec in enumerate(history.program, 1) if spec.cross]
    if seqs and rng.random() < 0.8:
        history.deviations[host, rng.choice(seqs)] = "swap"
        history.crosses = True
    else:
        seq = rng.randint(1, len(history.program))
        history.deviations[host, seq] = rng.choice(("absent", "absent", "late"))
    if rng.random() < 0.3:
        history.faults.append(_any_fault(rng, history))


def _draw_mismatch(rng: Random, history: History) -> None:
    for _ in range(rng.choice((1, 1, 2))):
        seqs = [n for n, spec in enumerate(history.program, 1) if spec.kind != "admit"]
        if seqs:
            history.deviations[rng.randrange(history.founders), rng.choice(seqs)] = "other"
    if rng.random() < 0.5:
        history.faults.append(_any_fault(rng, history))


def _leave(rng: Random, history: History) -> None:
    history.deviations[rng.randrange(history.founders), rng.randint(1, len(history.program))] = "leave"


def _draw_quorum(rng: Random, history: History) -> None:
    history.faults += [_host_fault(rng, history, "crash") for _ in range(rng.choice((1, 2, 2, 3)))]


def _draw_views(rng: Random, history: History) -> None:
    """Losses one upon the other, so that members see different ones when they call."""
    history.faults += [_host_fault(rng, history, "crash") for _ in range(rng.choice((1, 2, 2)))]
    if rng.random() < 0.4:
        history.faults.append(_coordinator_fault(rng))
    if rng.random() < 0.3:
        history.faults.append(_cut(rng, history.founders))


def _draw_calm(rng: Random, history: History) -> None:
    if rng.random() < 0.3:
        _leave(rng, history)


_DRAW: dict[str, Any] = {
    "calm": _draw_calm,
    "loss": _draw_loss,
    "coordinator": _draw_coordinator,
    "mixed": _draw_mixed,
    "join": _draw_join,
    "views": _draw_views,
    "link": _draw_link,
    "silence": _draw_silence,
    "stall": _draw_stall,
    "mismatch": _draw_mismatch,
    "quorum": _draw_quorum,
}
