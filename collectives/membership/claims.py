"""Names of sub-groups, and what becomes of members that mean different ones by the same name (rule R9).

A lane of a sub-group is known by its own name, the sub-group's name and a digest of its members, in order: members that
disagree about these use different lanes and channels, so nothing of one can be taken for the other's. They would wait
for each other; the coordinator sees both in the heartbeats and ends both lanes for good. Called by the communicator,
which names lanes, and by the coordinator.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

from collectives.membership.frontiers import Reports
from collectives.membership.protocol import LaneFrontier, LaneStatus, Verdict


@lru_cache(maxsize=1024)
def digest_of(members: tuple[int, ...]) -> int:
    """Number, never 0, that stands for these members in this order, whatever the epoch."""
    text = ",".join(map(str, members)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"ringhold group").digest()) or 1


def lane_of(name: str, members: tuple[int, ...], lane: str) -> str:
    """Name that a sub-group's lane has in the run; equal on members that mean the same one."""
    return f"{lane}@{name}#{digest_of(members):016x}"


def group_name(lane: str) -> str:
    """Name of the sub-group that a lane belongs to."""
    return lane.partition("@")[2].rpartition("#")[0]


def _digest(lane: str) -> str:
    return lane.rpartition("#")[2]


class Claims:
    """What the members of the current epoch mean by the names of sub-groups, as told by their heartbeats."""

    def __init__(self) -> None:
        self._meant: dict[str, set[str]] = {}
        """Per name of a sub-group, the digests of the members that it stands for."""
        self._ended: set[str] = set()

    def disputed(self, rows: Iterable[LaneStatus]) -> bool:
        """Take note of a heartbeat; tell whether its sender is in an operation of a sub-group that others dispute."""
        found = False
        for row in rows:
            if row.group and row.seq:
                meant = self._meant.setdefault(group_name(row.lane), set())
                meant.add(_digest(row.lane))
                found |= len(meant) > 1 and row.phase != "idle" and row.lane not in self._ended
        return found

    def settle(self, verdicts: Iterable[Verdict]) -> None:
        """Another epoch begins, with these verdicts: whoever is in it will say again what it means."""
        self._meant.clear()
        self._ended.update(verdict.lane for verdict in verdicts if verdict.error == "disputed")


def disputes(reports: Reports, lanes: Mapping[str, LaneFrontier]) -> list[Verdict]:
    """End every lane of a sub-group by whose name survivors mean different ones, for good."""
    meant: dict[str, dict[str, list[int]]] = {}
    for member, report in reports.items():
        for lane, row in report.items():
            if row.group and row.entered:
                meant.setdefault(group_name(lane), {}).setdefault(lane, []).append(member)
    verdicts: list[Verdict] = []
    for name, claims in meant.items():
        if len({_digest(lane) for lane in claims}) > 1:
            says = "; ".join(f"member {who[0]} says {list(lanes[lane].group)}" for lane, who in sorted(claims.items()))
            text = f"members disagree about who is in the sub-group {name!r}: {says}; name the same ones everywhere"
            verdicts += [Verdict(lane, lanes[lane].complete + 1, "disputed", text[:2000]) for lane in sorted(claims)]
    return verdicts
