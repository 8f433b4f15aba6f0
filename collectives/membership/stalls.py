"""Rule R11's judgements, apart from the state they act on: who is at fault when a link or an operation is stuck.

Called by the coordinator.
"""

from collections.abc import Iterable, Mapping

from collectives.membership.protocol import LaneStatus


def link_to_evict(link: frozenset[int], bad: Iterable[frozenset[int]]) -> int:
    """Choose the end of a failed link that has fewer good links (it is in more bad ones); on a tie the higher id."""
    bad = list(bad)
    return max(link, key=lambda member: (sum(member in other for other in bad), member))


def judge_stall(
    lanes: Mapping[int, Mapping[str, LaneStatus]], lane: str, seq: int
) -> tuple[list[int], list[tuple[str, int]]]:
    """Tell who is absent from operation `seq` of `lane`, or which operations wait for each other.

    Args:
        lanes: per member the status of its lanes, as of its last heartbeat.
        lane: lane of the operation that did not end.
        seq: its number.

    Returns:
        Members to evict, and the (lane, number) of crossed operations; at most one of the two is not empty.

    """

    def absent_from(name: str, number: int) -> set[int]:
        return {m for m, rows in lanes.items() if name not in rows or rows[name].seq < number}

    absent = absent_from(lane, seq)
    present = set(lanes) - absent
    crossed: set[tuple[str, int]] = set()
    for member in absent:
        for name, row in lanes[member].items():
            if row.phase != "idle" and name != lane and absent_from(name, row.seq) & present:
                crossed.add((name, row.seq))
    if crossed:
        return [], sorted({*crossed, (lane, seq)})
    return sorted(absent), []


def under_way(row: LaneStatus, seq: int) -> bool:
    """Whether a lane is in the middle of operation `seq`."""
    return row.seq == seq and row.phase != "idle"


def silent_links(lanes: Mapping[int, Mapping[str, LaneStatus]], lane: str, seq: int) -> list[tuple[int, int]]:
    """Return the links (who waits, for whom) that an operation waits on though everybody has entered it."""
    rows = {member: rows[lane] for member, rows in lanes.items() if lane in rows}
    return [
        (member, row.waiting_for)
        for member, row in rows.items()
        if under_way(row, seq) and row.waiting_for in lanes and row.waiting_for != member
    ]
