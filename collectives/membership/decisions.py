"""What a change of the membership comes to (rule R3), and what each member is told. Called by the coordinator."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from collectives.membership.claims import disputes
from collectives.membership.frontiers import Reports, frontiers, given_up
from collectives.membership.protocol import Decision, Differs, LaneFrontier, MemberInfo, Verdict
from collectives.membership.roster import Change


def lanes_and_verdicts(reports: Reports, posed: Iterable[Verdict]) -> tuple[dict[str, LaneFrontier], list[Verdict]]:
    """Where the lanes go on, and which operations end by an error instead.

    Args:
        reports: those of the survivors.
        posed: verdicts that were found before; those on operations that are complete by now are dropped.

    """
    lanes = frontiers(reports)
    verdicts = {(v.lane, v.seq): v for v in posed}
    verdicts |= {(v.lane, v.seq): v for v in given_up(reports, lanes)}
    verdicts |= {(v.lane, v.seq): v for v in disputes(reports, lanes)}
    return lanes, [v for v in verdicts.values() if v.lane not in lanes or lanes[v.lane].complete < v.seq]


def decide(
    before: Decision | None,
    change: Change,
    infos: Sequence[MemberInfo],
    posed: Iterable[Verdict],
    safe: AbstractSet[int],
    *,
    nonce: bytes,
    next_member: int,
    transport: str,
) -> Decision:
    """The epoch that a change comes to, once all of its members have reported.

    Args:
        before: the last decision.
        change: the change.
        infos: of its members, in their order.
        posed: as for `lanes_and_verdicts`.
        safe: the members that stand at a safe point.
        nonce, next_member, transport: as in `Decision`.

    """
    old = members_of(before)
    founding = before is None or before.ended
    survivors = [m for m in change.members if m in old]
    lanes, verdicts = lanes_and_verdicts({m: change.reports[m].lanes for m in survivors}, posed)
    return Decision(
        epoch=change.epoch,
        nonce=nonce,
        members=[msgspec.structs.replace(info, founder=True) for info in infos] if founding else list(infos),
        lost=[m for m in old if m not in change.members],
        joined=[m for m in change.members if m not in old],
        lanes=lanes,
        verdicts=verdicts,
        admitted=bool(survivors) and safe >= set(survivors),
        next_member=next_member,
        transport=transport,
    )


def nobody(before: Decision | None, epoch: int, nonce: bytes, next_member: int, ended: bool) -> Decision:
    """The epoch of no members: all were lost, or the last one left."""
    lost = list(members_of(before))
    return Decision(epoch, nonce, [], lost, [], {}, [], False, next_member, "", ended)


def members_of(decision: Decision | None) -> tuple[int, ...]:
    """Ids of its members by rank."""
    return tuple(info.member for info in decision.members) if decision else ()


def part_of(decision: Decision, member: int) -> Decision:
    """What a member is told of a decision: only the lanes that it has to do with, and the verdicts on these."""
    foreign = {name for name, frontier in decision.lanes.items() if frontier.group and member not in frontier.group}
    if not foreign:
        return decision
    return msgspec.structs.replace(
        decision,
        lanes={name: frontier for name, frontier in decision.lanes.items() if name not in foreign},
        verdicts=[verdict for verdict in decision.verdicts if verdict.lane not in foreign],
    )


def verdict_on(member: int, message: Differs) -> Verdict:
    """What becomes of an operation that `member` and a neighbour of it called differently (rule R9)."""
    if message.lost:
        text = f"operation {message.seq} of lane {message.lane!r} was issued by some members before a loss"
        return Verdict(message.lane, message.seq, "lost", text)
    text = (
        f"operation {message.seq} of lane {message.lane!r}: member {member} called {message.mine}, "
        f"member {message.other} called {message.theirs}; make every member call the same"
    )
    return Verdict(message.lane, message.seq, "mismatch", text[:2000])
