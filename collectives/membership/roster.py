"""Whom the coordinator knows, and the change that it is in. Used by the coordinator and by what it decides with."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from collectives.membership.actions import Connection
from collectives.membership.protocol import LaneStatus, MemberInfo, MemberStatus, Report


@dataclass(slots=True)
class Peer:
    """A peer that the coordinator knows: a member of the epoch, or one that waits to be."""

    info: MemberInfo
    transport: str
    connection: Connection | None
    heard: float
    beaten: float = -math.inf
    """When its last heartbeat came, whose `lanes` these are."""
    lanes: list[LaneStatus] = field(default_factory=list)


@dataclass(slots=True)
class Change:
    """A membership change under way: number, who must report, what they reported."""

    epoch: int
    members: tuple[int, ...]
    reports: dict[int, Report] = field(default_factory=dict)


def rows_for_people(
    peers: Mapping[int, Peer], members: Collection[int], change: Change | None, safe: Collection[int], now: float
) -> list[MemberStatus]:
    """Tell people of every peer: its rank among `members`, what it is doing, and how long ago it was heard."""
    ranks = {member: rank for rank, member in enumerate(members)}

    def state(member: int) -> str:
        if peers[member].connection is None:
            return "disconnected"
        if member not in ranks:
            return "waiting to be admitted"
        if change and member in change.members:
            return "reported" if member in change.reports else "asked to report"
        return "at a safe point" if member in safe else "member"

    return [MemberStatus(m, ranks.get(m, -1), state(m), now - peer.heard, peer.lanes) for m, peer in peers.items()]
