"""What a change comes to, and what each member is told of it."""

from collections.abc import Iterable

from collectives.membership.claims import disputes, lane_of
from collectives.membership.decisions import decide, lanes_and_verdicts, nobody, part_of, verdict_on
from collectives.membership.frontiers import frontiers, given_up
from collectives.membership.protocol import (
    Decision,
    Differs,
    LaneFrontier,
    LaneReport,
    MemberInfo,
    Report,
    Verdict,
    decode_from_coordinator,
    encode,
)
from collectives.membership.roster import Change
from tests.membership.desk import report_of

LONG = "x" * 2000


def info(member: int, founder: bool = False) -> MemberInfo:
    """A member."""
    return MemberInfo(member, bytes(16), "127.0.0.1", member, founder)


def epoch(number: int, members: list[int], ended: bool = False) -> Decision:
    """An epoch as it was decided before."""
    infos = [info(member, True) for member in members]
    return Decision(number, bytes(16), infos, [], [], {}, [], False, 9, "gloo", ended)


def decided(before: Decision | None, members: tuple[int, ...], safe: Iterable[int] = ()) -> Decision:
    """A change to these members, in which everybody has reported."""
    change = Change(7, members, {member: Report(7, {"main": report_of(member)}) for member in members})
    infos = [info(member) for member in members]
    return decide(before, change, infos, [], set(safe), nonce=bytes(16), next_member=9, transport="gloo")


def valid(verdicts: list[Verdict]) -> bool:
    """Whether members can read a decision with these verdicts."""
    message = Decision(1, bytes(16), [], [], [], {}, verdicts, False, 1, "gloo")
    return decode_from_coordinator(encode(message)) == message


def test_survivors_lost_and_joined() -> None:
    made = decided(epoch(3, [1, 2, 3]), (1, 3, 5), {1})
    assert (made.lost, made.joined, made.admitted, made.ended) == ([2], [5], False, False)
    assert (made.epoch, made.next_member, made.transport) == (7, 9, "gloo")
    # Joiners have nothing to say of lanes.
    assert made.lanes == {"main": LaneFrontier(3, 1, 3)}
    assert [i.founder for i in made.members] == [False] * 3


def test_all_survivors_stood_at_a_safe_point() -> None:
    assert decided(epoch(3, [1, 2, 3]), (1, 3, 5), {1, 3}).admitted
    assert decided(epoch(3, [1, 2, 3]), (1, 3, 5), {1, 2, 3}).admitted
    assert not decided(epoch(3, [1, 2, 3]), (4, 5)).admitted


def test_who_founds_a_run() -> None:
    assert all(i.founder for i in decided(None, (1, 2)).members)
    assert all(i.founder for i in decided(epoch(3, [], ended=True), (4, 5)).members)
    assert not any(i.founder for i in decided(epoch(3, []), (4, 5)).members)


def test_the_epoch_of_nobody() -> None:
    for ended in (False, True):
        made = nobody(epoch(3, [1, 2]), 4, bytes(16), 9, ended)
        assert (made.members, made.lost, made.joined, made.admitted, made.ended) == ([], [1, 2], [], False, ended)
    assert nobody(None, 4, bytes(16), 9, False).lost == []


def test_verdicts_on_what_is_complete_are_dropped() -> None:
    posed = [Verdict("main", seq, "mismatch", "so") for seq in (2, 3, 4)] + [Verdict("new", 1, "crossed", "so")]
    lanes, verdicts = lanes_and_verdicts({1: {"main": report_of(3)}, 2: {"main": report_of(3)}}, posed)
    assert lanes["main"].complete == 3
    assert verdicts == posed[2:]


def test_the_last_verdict_on_an_operation_is_what_a_survivor_knows_already() -> None:
    posed = [Verdict("main", 4, "mismatch", "so")]
    reports = {1: {"main": report_of(3, left=4, entered=4)}, 2: {"main": report_of(3)}}
    _, verdicts = lanes_and_verdicts(reports, posed)
    assert [(v.seq, v.error) for v in verdicts] == [(4, "lost")]


def test_a_member_is_told_of_its_own_lanes() -> None:
    lanes = {"main": LaneFrontier(1, 1, 1), "g": LaneFrontier(1, 1, 1, (1, 2))}
    verdicts = [Verdict("main", 2, "lost", "so"), Verdict("g", 2, "lost", "so")]
    whole = Decision(1, bytes(16), [], [], [], lanes, verdicts, False, 1, "gloo")
    assert part_of(whole, 2) is whole
    mine = part_of(whole, 3)
    assert (set(mine.lanes), mine.verdicts) == ({"main"}, verdicts[:1])


def test_a_difference_names_both_sides() -> None:
    made = verdict_on(1, Differs(1, "main", 2, "this", "that", 3, False))
    assert (made.lane, made.seq, made.error) == ("main", 2, "mismatch")
    assert "member 1 called this, member 3 called that" in made.message
    assert verdict_on(1, Differs(1, "main", 2, "this", "that", 3, True)).error == "lost"


def test_long_texts_are_cut_to_what_a_message_takes() -> None:
    assert valid([verdict_on(1, Differs(1, "main", 2, LONG, LONG, 3, False))])
    crowd = {m: {"main": report_of(1, left=2, entered=2)} for m in range(1000, 2000)} | {1: {"main": report_of(1)}}
    assert valid(given_up(crowd, frontiers(crowd)))
    groups = [tuple(range(first, first + 600)) for first in (1000, 2000)]
    reports = {g[0]: {lane_of("g", g, "main"): LaneReport(0, 0, 0, 0, 1, 0, g)} for g in groups}
    found = disputes(reports, frontiers(reports))
    assert len(found) == 2
    assert valid(found)
