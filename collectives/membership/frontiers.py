"""Rule R3's arithmetic: where a lane goes on, from what its survivors report of it. Called by the coordinator.

The survivors of a lane are those of its sub-group: who is not in it has nothing to say of it and holds nothing back,
but a member of it that never came to it does.
"""

from collections.abc import Mapping

from collectives.membership.protocol import Group, LaneFrontier, LaneReport, Verdict

_UNUSED = LaneReport(0, 0, 0, 0, 0, 0)
"""What a member says of a lane that it never used."""

Reports = Mapping[int, Mapping[str, LaneReport]]
"""Per survivor, its lanes."""


def rows_of(reports: Reports, name: str, group: Group) -> dict[int, LaneReport]:
    """What each survivor of a lane says of it."""
    return {m: lanes.get(name, _UNUSED) for m, lanes in reports.items() if not group or m in group}


def frontiers(reports: Reports) -> dict[str, LaneFrontier]:
    """Per lane the highest complete operation, or the one behind it if all its survivors staged that attempt."""
    lanes: dict[str, LaneFrontier] = {}
    groups = {name: row.group for report in reports.values() for name, row in report.items()}
    for name in sorted(groups):
        rows = rows_of(reports, name, groups[name]).values()
        complete, epoch = max((row.complete, row.complete_epoch) for row in rows)
        attempts = {(row.staged, row.staged_epoch) for row in rows}
        if len(attempts) == 1:
            staged, staged_epoch = attempts.pop()
            if staged > complete:
                complete, epoch = staged, staged_epoch
        lanes[name] = LaneFrontier(complete, epoch, max(row.entered for row in rows), groups[name])
    return lanes


def given_up(reports: Reports, lanes: Mapping[str, LaneFrontier]) -> list[Verdict]:
    """Operations that a survivor has left by an error of its own view (rule R6) and others have still before them.

    It takes no part in them any more, so they can never be complete: the others end them with `MemberLost` too.
    """
    verdicts: list[Verdict] = []
    for name, frontier in lanes.items():
        left = {member: row.left for member, row in rows_of(reports, name, frontier.group).items()}
        first = max(frontier.complete, min(left.values())) + 1
        for seq in range(first, max(left.values()) + 1):
            who = ", ".join(str(member) for member in left if left[member] >= seq)
            text = f"operation {seq} of lane {name!r} was ended by a loss that member {who} saw before others called it"
            verdicts.append(Verdict(name, seq, "lost", text[:2000]))
    return verdicts
