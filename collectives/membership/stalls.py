"""Rule R11's judgements, apart from the state they act on: who is at fault when a link or an operation is stuck.

Called by the coordinator.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from collectives.membership.protocol import LaneStatus


def link_to_evict(link: frozenset[int], bad: Iterable[frozenset[int]]) -> int:
    """Choose the end of a failed link that has fewer good links (it is in more bad ones); on a tie the higher id."""
    bad = list(bad)
    return max(link, key=lambda member: (sum(member in other for other in bad), member))


Rows = Mapping[int, Mapping[str, LaneStatus]]
"""Per member the status of its lanes, as of its last heartbeat."""

Op = tuple[str, int]
"""An operation: its lane and number."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why an operation does not end; one of the three is set."""

    absent: tuple[int, ...] = ()
    """Members to evict."""
    crossed: tuple[Op, ...] = ()
    """Operations that wait for each other."""
    stuck: Op | None = None
    """Everybody is in this one and it does not move: a link is dead without a sound."""


def judge_stall(rows: Rows, lane: str, seq: int, patience: float) -> Judgement:
    """Tell why operation `seq` of `lane` does not end.

    Who has not come to it may be stuck in another one itself, where somebody else is at fault: that one is judged then.

    Args:
        rows: what the members are doing.
        lane: lane of the operation.
        seq: its number.
        patience: seconds after which an operation that all have entered counts as stuck.

    """
    trail: list[Op] = []
    while True:
        op = _first_stuck(rows, lane, seq)
        if op in trail:
            return Judgement(crossed=tuple(sorted(trail[trail.index(op) :])))
        trail.append(op)
        absent = _absent_from(rows, op)
        if not absent:
            return Judgement(stuck=op)
        elsewhere = {member: _stuck_elsewhere(rows, member, op[0], patience) for member in absent}
        idle = tuple(member for member in absent if elsewhere[member] is None)
        if idle:
            return Judgement(absent=idle)
        lane, seq = elsewhere[absent[0]] or op


def _first_stuck(rows: Rows, lane: str, seq: int) -> Op:
    """Return the first operation of a lane that somebody is still in: others stand behind it, they are not absent."""
    here = (lanes[lane] for lanes in rows.values() if lane in lanes)
    return lane, min([seq, *(row.seq for row in here if row.phase != "idle")])


def _absent_from(rows: Rows, op: Op) -> list[int]:
    name, number = op
    return sorted(m for m, lanes in rows.items() if name not in lanes or lanes[name].seq < number)


def _stuck_elsewhere(rows: Rows, member: int, lane: str, patience: float) -> Op | None:
    """Return the operation of another lane that a member waits in, None if it waits for nobody."""
    for name, row in sorted(rows[member].items()):
        waits = row.phase != "idle" and name != lane
        if waits and (row.seconds > patience or _absent_from(rows, (name, row.seq))):
            return name, row.seq
    return None


def under_way(row: LaneStatus, seq: int) -> bool:
    """Whether a lane is in the middle of operation `seq`."""
    return row.seq == seq and row.phase != "idle"


def silent_links(rows: Rows, lane: str, seq: int) -> list[tuple[int, int]]:
    """Return the links (who waits, for whom) that an operation waits on though everybody has entered it."""
    waiting = {member: lanes[lane] for member, lanes in rows.items() if lane in lanes}
    return [
        (member, row.waiting_for)
        for member, row in waiting.items()
        if under_way(row, seq) and row.waiting_for in rows and row.waiting_for != member
    ]
