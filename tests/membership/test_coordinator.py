"""The coordinator's state machine, one rule at a time; the simulation tries them together."""

import pytest

from collectives.membership.coordinator import Persist, Send
from collectives.membership.protocol import (
    Admit,
    Alive,
    Beat,
    Decision,
    Differs,
    Evict,
    Inspect,
    Join,
    LaneStatus,
    Leave,
    LinkDown,
    Prepare,
    Prepared,
    Proof,
    Refused,
    Report,
    Stalled,
    Status,
    Waiting,
)
from tests.membership.desk import Desk, ids, report_of, row


def test_the_first_epoch_waits_for_all_founders() -> None:
    desk = Desk(founders=3)
    desk.join(1)
    desk.join(2)
    assert desk.core.change is None
    desk.join(3)
    assert desk.preparing() == Prepare(1, [1, 2, 3])
    assert desk.report(1, 2) is None
    decision = desk.report(3)
    assert decision is not None
    assert ids(decision) == [1, 2, 3]
    assert all(info.founder for info in decision.members)
    assert not decision.admitted


def test_a_number_is_on_disk_before_it_is_told_and_a_decision_too() -> None:
    desk = Desk()
    desk.join(1)
    join = Join(bytes(16), "127.0.0.1", 2, "gloo")
    actions = desk.core.on_message(2, join, desk.now)
    assert actions[1] == Persist(Prepared(1))
    assert all(isinstance(a, Send) and isinstance(a.message, Prepare) for a in actions[2:])
    desk.do(actions)
    desk.say(1, Report(1, {}))
    actions = desk.core.on_message(2, Report(1, {}), desk.now)
    assert isinstance(actions[0], Persist)
    assert isinstance(actions[0].record, Decision)
    assert all(isinstance(a, Send) and a.message == actions[0].record for a in actions[1:3])


def test_a_founder_that_dies_in_the_founding_is_waited_for_again() -> None:
    desk = Desk(founders=2)
    desk.join(1)
    desk.join(2)
    desk.close(2)
    assert desk.core.change is None
    desk.join(3)
    assert desk.preparing() == Prepare(2, [1, 3])


def test_frontiers_come_from_the_reports_of_the_survivors() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.close(3)
    decision = desk.report(1, 2, lanes={1: report_of(4, staged=5), 2: report_of(4, staged=5)})
    assert decision is not None
    assert (decision.lanes["main"].complete, decision.lanes["main"].complete_epoch) == (5, 1)
    assert decision.lost == [3]


def test_a_loss_in_a_change_begins_it_anew_under_a_new_number() -> None:
    desk = Desk(founders=4)
    desk.found(1, 2, 3, 4)
    desk.close(4)
    assert desk.preparing() == Prepare(2, [1, 2, 3])
    desk.report(1)
    desk.close(3)
    assert desk.preparing() == Prepare(3, [1, 2])
    # A report for the number that was given up counts for nothing.
    desk.say(1, Report(2, {}))
    assert desk.report(2) is None
    assert ids(desk.report(1)) == [1, 2]


def test_waiting_peers_are_announced_and_come_in_when_all_stand_at_a_safe_point() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.join(3)
    assert desk.told[1][-1] == Waiting(1)
    desk.say(1, Admit(1))
    assert desk.core.change is None
    desk.say(2, Admit(1))
    assert desk.preparing() == Prepare(2, [1, 2, 3])
    decision = desk.report(1, 2, 3)
    assert decision is not None
    assert (decision.joined, decision.admitted) == ([3], True)
    assert [info.founder for info in decision.members] == [True, True, False]


def test_a_safe_point_of_an_older_epoch_counts_for_nothing() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.say(1, Admit(1))
    desk.say(2, Admit(1))
    desk.close(3)
    # Both left stand at their safe points: that is what they asked for.
    decision = desk.report(1, 2)
    assert decision is not None
    assert decision.admitted
    desk.join(4)
    desk.say(1, Admit(1))
    desk.say(2, Admit(1))
    assert desk.core.change is None


def test_a_loss_before_all_are_safe_lets_nobody_in() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.join(4)
    desk.say(1, Admit(1))
    desk.close(3)
    assert desk.preparing() == Prepare(2, [1, 2])
    decision = desk.report(1, 2)
    assert decision is not None
    assert not decision.admitted
    assert desk.told[1][-1] == Waiting(1)


def test_a_joiner_that_dies_in_its_admission_is_left_out() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.join(3)
    desk.join(4)
    desk.say(1, Admit(1))
    desk.say(2, Admit(1))
    desk.report(1, 2, 3)
    desk.close(4)
    assert desk.preparing() == Prepare(3, [1, 2, 3])
    decision = desk.report(1, 2, 3)
    assert decision is not None
    assert (decision.joined, decision.admitted) == ([3], True)


def test_silence_evicts_and_says_why() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.wait(5.0, 1, 2)
    assert desk.preparing() == Prepare(2, [1, 2])
    evict = desk.told[3][-1]
    assert isinstance(evict, Evict)
    assert evict.kind == "evicted"
    assert "silent for more than 4 s" in evict.reason
    assert 3 in desk.closed


def test_all_silent_at_once_evicts_nobody_even_if_their_beats_are_apart() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    for connection in (1, 2, 3):
        desk.say(connection, Beat([]))
        desk.tick(0.3)
    desk.wait(20.0)
    assert desk.core.members == (1, 2, 3)
    # They gave their connections up meanwhile; one after the other comes back.
    for connection in (1, 2, 3):
        desk.close(connection)
    assert desk.core.members == (1, 2, 3)
    desk.resume(11, 1, 1, 1, 1)
    desk.wait(2.0, 11)
    desk.resume(12, 2, 2, 1, 1)
    desk.resume(13, 3, 3, 1, 1)
    desk.wait(6.0, 11, 12, 13)
    assert desk.core.members == (1, 2, 3)
    assert desk.core.change is None


def test_a_gap_in_its_own_loop_is_not_held_against_the_members() -> None:
    for first in ("tick", "close"):
        desk = Desk()
        desk.found(1, 2)
        desk.now += 30.0
        if first == "tick":
            desk.tick()
        desk.close(1)
        desk.close(2)
        assert desk.core.members == (1, 2)
        desk.resume(11, 1, 1, 1, 1)
        desk.resume(12, 2, 2, 1, 1)
        desk.wait(6.0, 11, 12)
        assert desk.core.members == (1, 2)


def test_a_connection_that_closes_is_a_death() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.wait(1.0, 1, 2)
    desk.close(2)
    assert desk.preparing() == Prepare(2, [1])


def test_a_connection_that_was_replaced_closes_without_harm() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.resume(12, 2, 2, 1, 1)
    assert 2 in desk.closed
    desk.close(2)
    assert desk.core.members == (1, 2)


def test_leaving_is_told_and_the_last_one_ends_the_run() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(2, Leave("enough"))
    bye = desk.told[2][-1]
    assert bye == Evict("left", "member 2 left: enough")
    desk.report(1)
    actions = desk.core.on_message(1, Leave("enough"), desk.now)
    persisted = [n for n, a in enumerate(actions) if isinstance(a, Persist)]
    told = [n for n, a in enumerate(actions) if isinstance(a, Send) and isinstance(a.message, Evict)]
    assert max(persisted) < min(told)
    desk.do(actions)
    last = desk.disk[-1]
    assert isinstance(last, Decision)
    assert last.ended
    # The next ones found the run anew, also after a restart.
    again = desk.restart()
    assert again.join(1) > 2
    assert again.core.change is None
    again.join(2)
    decision = again.report(1, 2)
    assert decision is not None
    assert all(info.founder for info in decision.members)


def test_where_the_last_one_died_the_next_are_no_founders() -> None:
    desk = Desk(founders=1)
    desk.found(1)
    desk.close(1)
    desk.join(2)
    decision = desk.report(2)
    assert decision is not None
    assert not decision.members[0].founder
    assert not decision.admitted


def test_quorum_dissolves_the_rest_and_says_why() -> None:
    desk = Desk(founders=4, quorum=True)
    desk.found(1, 2, 3, 4)
    desk.close(4)
    assert desk.preparing() == Prepare(2, [1, 2, 3])
    desk.close(3)
    assert desk.core.members == ()
    for connection in (1, 2):
        evict = desk.told[connection][-1]
        assert isinstance(evict, Evict)
        assert evict.kind == "quorum"
        assert "2 of 4" in evict.reason
    last = desk.disk[-1]
    assert isinstance(last, Decision)
    assert last.members == []


def test_min_members_dissolves_the_rest() -> None:
    desk = Desk(founders=2, min_members=2)
    desk.found(1, 2)
    desk.close(2)
    evict = desk.told[1][-1]
    assert isinstance(evict, Evict)
    assert "`min_members` is 2" in evict.reason


def test_a_restart_announces_the_last_decision_and_never_uses_a_number_again() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.close(3)
    assert desk.disk[-1] == Prepared(2)
    again = desk.restart()
    assert again.core.members == (1, 2, 3)
    # Member 1 never heard of the first epoch, member 2 has fenced for the change that died.
    told = again.resume(11, 1, 1, 0, 1)
    assert isinstance(told[0], Decision)
    assert told[0].epoch == 1
    told = again.resume(12, 2, 2, 1, 2)
    assert Prepare(3, [1, 2, 3]) in told
    again.wait(5.0, 11, 12)
    assert again.preparing() == Prepare(4, [1, 2])


def test_after_a_restart_everybody_has_a_whole_timeout() -> None:
    again = _restarted()
    again.wait(3.5)
    again.resume(11, 1, 1, 1, 1)
    again.resume(12, 2, 2, 1, 1)
    again.wait(6.0, 11, 12)
    assert again.core.members == (1, 2)
    assert again.core.change is None


def _restarted() -> Desk:
    desk = Desk()
    desk.found(1, 2)
    return desk.restart()


def test_an_old_journal_stops_the_coordinator() -> None:
    for member, epoch, promised in ((1, 2, 2), (1, 1, 2), (77, 5, 5), (77, 0, 2)):
        again = _restarted()
        again.resume(1, member, member, epoch, promised)
        assert "this journal is old" in again.stops[0], (member, epoch, promised)


def test_who_is_no_member_is_told_so() -> None:
    desk = Desk()
    desk.found(1, 2)
    told = desk.resume(9, 9, 9, 1, 1)
    assert isinstance(told[0], Evict)
    assert 9 in desk.closed


def test_nobody_resumes_in_another_ones_name() -> None:
    desk = Desk()
    desk.found(1, 2)
    told = desk.resume(9, 9, 1, 1, 1)
    assert isinstance(told[0], Evict)
    assert desk.core.peers[1].connection == 1
    assert desk.core.members == (1, 2)


def test_a_joiner_resumes_before_there_is_any_epoch() -> None:
    desk = Desk(founders=2)
    desk.join(1)
    desk.join(2)
    told = desk.resume(11, 1, 1, 0, 1)
    assert told[-1] == Prepare(1, [1, 2])
    assert ids(desk.report(11, 2)) == [1, 2]


def test_a_joiner_that_resumes_is_told_nothing_of_an_epoch_that_it_is_not_in() -> None:
    desk = Desk(founders=1)
    desk.join(1)
    desk.report(1, 1)
    desk.join(2)
    desk.say(1, Admit(1))
    desk.report(2, 2)
    told = desk.resume(12, 2, 2, 0, 2)
    assert told == [Waiting(1), Prepare(2, [1, 2])]


def test_a_joiner_that_fenced_for_a_given_up_change_begins_none() -> None:
    desk = Desk(founders=2)
    desk.join(1)
    desk.join(2)
    desk.close(2)
    told = desk.resume(11, 1, 1, 0, 1)
    assert told == [Waiting(1)]
    assert desk.core.change is None


def test_a_failed_link_is_mended_once_then_one_end_is_evicted() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.say(1, LinkDown(1, 2))
    assert desk.core.change is None  # if the other end died, that is noticed first
    desk.wait(1.5, 1, 2, 3)
    assert desk.preparing() == Prepare(2, [1, 2, 3])
    desk.report(1, 2, 3)
    desk.say(1, LinkDown(2, 2))
    desk.say(2, LinkDown(2, 1))
    desk.say(3, LinkDown(2, 1))
    desk.wait(1.5, 1, 2, 3)
    # Member 1 is in two bad links, member 2 in one.
    assert desk.core.members == (2, 3)
    evict = desk.told[1][-1]
    assert isinstance(evict, Evict)
    assert "links to [2] failed twice" in evict.reason


def test_a_failed_link_of_an_older_epoch_counts_for_nothing() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(1, LinkDown(0, 2))
    desk.wait(3.0, 1, 2)
    assert desk.core.change is None


def test_a_difference_becomes_a_verdict_for_all() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(1, Differs(1, "main", 3, "all_reduce(...)", "barrier(...)", 2, False))
    desk.say(2, Differs(1, "main", 3, "barrier(...)", "all_reduce(...)", 1, False))
    decision = desk.report(1, 2)
    assert decision is not None
    (verdict,) = decision.verdicts
    assert (verdict.lane, verdict.seq, verdict.error) == ("main", 3, "mismatch")
    assert "member 1 called all_reduce(...), member 2 called barrier(...)" in verdict.message


def test_a_difference_by_a_loss_is_a_loss() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(1, Differs(1, "main", 3, "a", "b", 2, True))
    decision = desk.report(1, 2)
    assert decision is not None
    assert decision.verdicts[0].error == "lost"


def test_no_verdict_on_what_is_complete_and_none_from_an_older_epoch() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(1, Differs(0, "main", 3, "a", "b", 2, False))
    assert desk.core.change is None
    desk.say(1, Differs(1, "main", 3, "a", "b", 2, False))
    decision = desk.report(1, 2, lanes={1: report_of(3), 2: report_of(3)})
    assert decision is not None
    assert decision.verdicts == []


def test_what_a_survivor_has_left_is_a_loss_for_the_others_whatever_was_complained_of() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.say(1, Differs(1, "main", 3, "a", "b", 2, False))
    lanes = {1: report_of(2, entered=3), 2: report_of(2, entered=4, left=3), 3: report_of(2, entered=3)}
    decision = desk.report(1, 2, 3, lanes=lanes)
    assert decision is not None
    assert [(v.seq, v.error) for v in decision.verdicts] == [(3, "lost")]
    assert "member 2" in decision.verdicts[0].message


def _stall(desk: Desk, beats: dict[int, list[LaneStatus]], seq: int = 2) -> None:
    """Connection 1 complains; then all beat with these lanes for a while."""
    desk.say(1, Beat([row(seq)]))
    desk.say(1, Stalled(1, "main", seq))
    for _ in range(10):
        for connection, lanes in beats.items():
            desk.say(connection, Beat(lanes))
        desk.tick()


def test_who_is_absent_for_too_long_is_evicted() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    _stall(desk, {1: [row(2)], 2: [row(1, "idle")], 3: [row(2)]})
    assert desk.core.members == (1, 3)
    evict = desk.told[2][-1]
    assert isinstance(evict, Evict)
    assert "absent from operation 2 of lane 'main' for 30 s" in evict.reason


def test_a_stall_is_not_judged_on_heartbeats_from_before_it() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    # As after a restart: nobody has beaten yet.
    desk.say(1, Stalled(1, "main", 2))
    desk.tick()
    assert desk.core.members == (1, 2, 3)
    _stall(desk, {1: [row(3)], 2: [row(3)], 3: [row(3)]})
    assert desk.core.members == (1, 2, 3)
    assert desk.core.change is None  # the operation has ended meanwhile


def test_waits_that_cross_end_with_an_error_on_both() -> None:
    desk = Desk(founders=2)
    desk.found(1, 2)
    _stall(desk, {1: [row(2), row(4, "idle", lane="side")], 2: [row(1, "idle"), row(5, lane="side")]})
    decision = desk.report(1, 2)
    assert decision is not None
    assert [(v.lane, v.seq, v.error) for v in decision.verdicts] == [("main", 2, "crossed"), ("side", 5, "crossed")]


def test_an_operation_that_all_are_in_has_a_dead_link() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    _stall(desk, {1: [row(2)], 2: [row(2, waiting_for=3)], 3: [row(2)]})
    assert desk.preparing() == Prepare(2, [1, 2, 3])
    desk.report(1, 2, 3)
    desk.say(1, Beat([row(2)]))
    desk.say(1, Stalled(2, "main", 2))
    for _ in range(10):
        for connection, waiting_for in ((1, 0), (2, 3), (3, 0)):
            desk.say(connection, Beat([row(2, waiting_for=waiting_for)]))
        desk.tick()
    assert desk.core.members == (1, 2)  # not member 1, who only complained


def test_strangers_and_garbage_are_refused() -> None:
    desk = Desk()
    desk.found(1, 2)
    assert isinstance(desk.say(9, Beat([]))[0], Refused)
    assert 9 in desk.closed
    assert isinstance(desk.say(1, Join(bytes(16), "127.0.0.1", 1, "gloo"))[0], Refused)
    assert isinstance(desk.say(2, Proof(1, "run", bytes(16), bytes(32)))[0], Refused)
    told = desk.say(8, Join(bytes(16), "127.0.0.1", 1, "mpi"))
    assert isinstance(told[0], Refused)
    assert "uses transport 'gloo', the peer wants 'mpi'" in told[0].reason


def test_a_heartbeat_is_answered() -> None:
    desk = Desk()
    desk.found(1, 2)
    assert desk.say(1, Beat([])) == [Alive()]


def test_the_status_tells_what_everybody_does() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.join(4)
    desk.say(1, Beat([row(2)]))
    desk.say(2, Admit(1))
    desk.now += 0.5
    (status,) = desk.say(99, Inspect())
    assert isinstance(status, Status)
    assert (status.run, status.epoch, status.change, status.waiting) == ("run", 1, 0, 1)
    assert [(m.member, m.rank, m.state) for m in status.members] == [
        (1, 0, "member"),
        (2, 1, "at a safe point"),
        (3, 2, "member"),
        (4, -1, "waiting to be admitted"),
    ]
    assert status.members[0].lanes == [row(2)]
    assert status.members[0].age == 0.5
    desk.close(3)
    desk.report(1)
    (status,) = desk.say(99, Inspect())
    assert isinstance(status, Status)
    assert [m.state for m in status.members] == ["reported", "asked to report", "waiting to be admitted"]
    (status,) = _restarted().say(99, Inspect())
    assert isinstance(status, Status)
    assert {m.state for m in status.members} == {"disconnected"}


def test_who_asks_for_a_status_is_no_sign_of_life() -> None:
    desk = Desk()
    desk.found(1, 2)
    for _ in range(30):
        desk.say(99, Inspect())
        desk.tick()
    assert desk.core.members == (1, 2)


def test_nobody_joins_or_resumes_on_a_connection_that_has_joined() -> None:
    desk = Desk()
    desk.found(1, 2)
    told = desk.resume(1, 2, 2, 1, 1)
    assert isinstance(told[0], Refused)
    assert told[1:] == []
    assert 1 in desk.closed
    assert desk.core.peers[2].connection == 2


def test_a_run_has_one_transport_whichever_comes_first_in_the_alphabet() -> None:
    desk = Desk()
    desk.found(1, 2)
    for connection, transport in ((8, "mpi"), (9, "a")):
        assert isinstance(desk.say(connection, Join(bytes(16), "127.0.0.1", 1, transport))[0], Refused)
    assert desk.core.waiting == ()


def test_who_waits_founds_even_if_more_wait_than_must() -> None:
    desk = Desk(founders=2)
    for connection in (1, 2, 3, 4):
        desk.join(connection)
    desk.close(1)
    assert desk.preparing() == Prepare(2, [2, 3, 4])


def test_how_many_wait_is_told_when_it_changes_and_only_then() -> None:
    desk = Desk()
    desk.found(1, 2)
    assert not any(isinstance(message, Waiting) for message in desk.told[1])
    desk.join(3)
    desk.join(4)
    desk.say(1, Admit(1))
    desk.close(3)
    assert [message for message in desk.told[1] if isinstance(message, Waiting)] == [Waiting(1), Waiting(2), Waiting(1)]


@pytest.mark.parametrize(("before", "left", "goes_on"), [(3, 1, False), (4, 2, False), (7, 3, False), (7, 4, True)])
def test_a_quorum_is_more_than_half(before: int, left: int, goes_on: bool) -> None:
    desk = Desk(founders=before, quorum=True)
    desk.found(*range(1, before + 1))
    for connection in range(left + 1, before + 1):
        desk.close(connection)
    assert (desk.core.change is not None) is goes_on


def test_the_status_before_there_is_any_epoch() -> None:
    desk = Desk()
    desk.join(1)
    (status,) = desk.say(99, Inspect())
    assert isinstance(status, Status)
    assert (status.epoch, status.change, status.waiting) == (0, 0, 1)


def test_complaints_of_another_epoch_count_for_nothing() -> None:
    for epoch in (0, 2):
        desk = Desk()
        desk.found(1, 2)
        desk.say(1, LinkDown(epoch, 2))
        desk.say(1, Differs(epoch, "main", 1, "a", "b", 2, False))
        desk.say(1, Admit(epoch))
        desk.say(2, Admit(epoch))
        desk.wait(3.0, 1, 2)
        assert desk.core.change is None


def test_numbers_go_up_by_one() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.close(2)
    assert desk.preparing() == Prepare(2, [1])
    desk.close(1)
    assert desk.core.highest == 3
    assert desk.join(3) == 3


def test_a_journal_of_nothing_is_old_to_who_has_seen_an_epoch() -> None:
    desk = Desk()
    desk.resume(1, 1, 1, 1, 1)
    assert "the journal ends at 0" in desk.stops[0]


def test_a_run_that_was_dissolved_is_not_founded_anew() -> None:
    desk = Desk(founders=3, quorum=True)
    desk.found(1, 2, 3)
    desk.close(1)
    desk.close(2)
    last = desk.disk[-1]
    assert isinstance(last, Decision)
    assert (last.members, last.ended) == ([], False)


def test_the_evicted_are_strangers() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.wait(5.0, 1)
    assert 2 in desk.closed
    actions = desk.core.on_message(2, Beat([]), desk.now)
    assert actions[0] == Send(2, Refused("say Join or Resume first"))


def test_the_status_tells_how_long_ago_somebody_was_heard() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.now += 150.5
    (status,) = desk.say(99, Inspect())
    assert isinstance(status, Status)
    assert {m.age for m in status.members} == {150.5}


def test_after_a_restart_who_waits_is_announced_to_all() -> None:
    again = _restarted()
    assert again.resume(11, 1, 1, 1, 1) == [Waiting(0)]
    again.resume(12, 2, 2, 1, 1)
    told = len(again.told[11])
    again.join(3)
    assert again.told[11][told:] == [Waiting(1)]


def test_who_is_behind_is_told_and_needs_no_change() -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.close(3)
    assert desk.report(1, 2) is not None
    again = desk.restart()
    told = again.resume(11, 1, 1, 1, 1)
    assert [type(message) for message in told] == [Decision, Waiting]
    assert again.core.change is None
