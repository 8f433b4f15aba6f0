"""Names of sub-groups' lanes, and members that mean different ones by the same name."""

from collectives.membership.claims import Claims, digest_of, disputes, group_name, lane_of
from collectives.membership.decisions import part_of
from collectives.membership.frontiers import frontiers
from collectives.membership.protocol import (
    Beat,
    Decision,
    LaneReport,
    LaneStatus,
    Prepare,
    Report,
    Verdict,
    VerdictKind,
)
from tests.membership.desk import Desk

LOW, HIGH = lane_of("tp", (1, 2), "main"), lane_of("tp", (1, 2, 3), "main")


def status(lane: str, group: tuple[int, ...], phase: str = "waiting", seq: int = 1) -> LaneStatus:
    """A sub-group's lane in a heartbeat, as decoded."""
    return LaneStatus(lane, seq, "all_reduce", "".join([*phase]), 0, 0.1, group)


def report(complete: int, left: int, group: tuple[int, ...]) -> LaneReport:
    """A sub-group's lane in a report."""
    return LaneReport(complete, 1 if complete else 0, 0, 0, left + 1, left, group)


def test_a_lane_is_named_by_its_sub_group_and_the_members_in_order() -> None:
    assert (
        len({LOW, HIGH, lane_of("tp", (2, 1), "main"), lane_of("dp", (1, 2), "main"), lane_of("tp", (1, 2), "a")}) == 5
    )
    assert lane_of("tp", (1, 2), "main") == LOW
    assert LOW.startswith("main@tp#")
    assert group_name(LOW) == group_name(HIGH) == "tp"
    assert digest_of((1, 2)) != digest_of((12,))


def test_a_dispute_is_seen_when_somebody_waits() -> None:
    claims = Claims()
    assert not claims.disputed([status(LOW, (1, 2))])
    assert not claims.disputed([status(HIGH, (1, 2, 3), "idle")])
    assert claims.disputed([status(LOW, (1, 2))])
    assert not claims.disputed([status(lane_of("dp", (1, 2), "main"), (1, 2)), status("main", ())])


def test_lanes_that_were_never_entered_claim_nothing() -> None:
    claims = Claims()
    assert not claims.disputed([status(LOW, (1, 2), seq=0)])
    assert not claims.disputed([status(HIGH, (1, 2, 3))])


def test_a_dispute_that_has_ended_is_none_but_a_third_opinion_is() -> None:
    claims = Claims()
    reports = {1: {LOW: report(0, 0, (1, 2))}, 2: {HIGH: report(0, 0, (1, 2, 3))}}
    claims.settle(disputes(reports, frontiers(reports)))
    assert not claims.disputed([status(LOW, (1, 2)), status(HIGH, (1, 2, 3))])
    assert claims.disputed([status(lane_of("tp", (2, 1), "main"), (2, 1))])


def test_a_lane_whose_operation_crossed_another_may_be_disputed_still() -> None:
    kinds: tuple[VerdictKind, ...] = ("crossed", "lost", "mismatch")
    for kind in kinds:
        claims = Claims()
        claims.settle([Verdict(LOW, 1, kind, "why")])
        assert not claims.disputed([status(HIGH, (1, 2, 3), "idle")])
        assert claims.disputed([status(LOW, (1, 2))])


def test_all_lanes_by_that_name_end_behind_what_is_complete() -> None:
    aux = lane_of("tp", (1, 2), "aux")
    reports = {
        1: {LOW: report(4, 4, (1, 2)), aux: report(0, 0, (1, 2))},
        2: {LOW: report(3, 3, (1, 2))},
        3: {HIGH: report(0, 0, (1, 2, 3)), lane_of("dp", (3,), "main"): report(7, 7, (3,))},
    }
    verdicts = disputes(reports, frontiers(reports))
    assert {(v.lane, v.seq, v.error) for v in verdicts} == {
        (LOW, 5, "disputed"),
        (HIGH, 1, "disputed"),
        (aux, 1, "disputed"),
    }
    assert "member 1 says [1, 2]" in verdicts[0].message
    assert "member 3 says [1, 2, 3]" in verdicts[0].message


def test_the_coordinator_ends_a_dispute_and_tells_each_member_of_its_own_lanes() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.say(1, Beat([status(LOW, (1, 2))]))
    assert desk.preparing() is None
    desk.say(3, Beat([status(HIGH, (1, 2, 3))]))
    assert desk.preparing() == Prepare(2, [1, 2, 3])
    desk.say(1, Report(2, {LOW: report(0, 0, (1, 2))}))
    desk.say(2, Report(2, {}))
    desk.say(3, Report(2, {HIGH: report(0, 0, (1, 2, 3))}))
    told = [next(m for m in reversed(desk.told[c]) if isinstance(m, Decision)) for c in (1, 2, 3)]
    assert [set(decision.lanes) for decision in told] == [{LOW, HIGH}, {LOW, HIGH}, {HIGH}]
    assert [{v.lane for v in decision.verdicts} for decision in told] == [{LOW, HIGH}, {LOW, HIGH}, {HIGH}]
    whole = desk.disk[-1]
    assert isinstance(whole, Decision)
    assert part_of(whole, 3) == told[2]
    assert set(whole.lanes) == {LOW, HIGH}
    desk.say(1, Beat([status(LOW, (1, 2))]))
    assert desk.say(3, Beat([status(HIGH, (1, 2, 3))]))[1:] == []


def test_any_phase_but_idle_is_an_operation_under_way() -> None:
    for phase in ("confirming", "moving", "recovering", "waiting"):
        claims = Claims()
        claims.disputed([status(HIGH, (1, 2, 3), "idle")])
        assert claims.disputed([status(LOW, (1, 2), phase)])


def test_disputes_name_who_says_what() -> None:
    reports = {2: {HIGH: report(0, 0, (1, 2, 3))}, 1: {LOW: report(0, 0, (1, 2))}, 3: {HIGH: report(0, 0, (1, 2, 3))}}
    told = {verdict.message for verdict in disputes(reports, frontiers(reports))}
    (text,) = told
    assert "member 1 says [1, 2]" in text
    assert "member 2 says [1, 2, 3]" in text
    assert "member 3" not in text


def test_a_disputed_lane_ends_behind_its_last_complete_operation() -> None:
    for complete in (0, 1, 2):
        reports = {1: {LOW: report(complete, complete, (1, 2))}, 2: {HIGH: report(0, 0, (1, 2, 3))}}
        assert [v.seq for v in disputes(reports, frontiers(reports)) if v.lane == LOW] == [complete + 1]
