"""The member's state machine, one rule at a time; the simulation tries them together."""

import msgspec
import pytest

from collectives.errors import CrossedWaits, DescriptorMismatch, Evicted, MemberLost, QuorumLost, RingholdError
from collectives.membership.member import Completed, Member, Run, Wait
from collectives.membership.protocol import (
    Admit,
    Decision,
    Differs,
    Evict,
    LaneFrontier,
    Leave,
    LinkDown,
    MemberInfo,
    Prepare,
    Report,
    Stalled,
    Verdict,
    decode_from_peer,
    encode,
)


def decide(
    epoch: int,
    members: list[int],
    lanes: dict[str, LaneFrontier] | None = None,
    verdicts: list[Verdict] | None = None,
    admitted: bool = False,
) -> Decision:
    """An epoch as it is announced."""
    infos = [MemberInfo(m, bytes(16), "127.0.0.1", m, True) for m in members]
    return Decision(epoch, bytes(16), infos, [], [], lanes or {}, verdicts or [], admitted, 9, "gloo")


@pytest.fixture
def core() -> Member:
    """Member 1 of epoch 1, with member 2."""
    made = Member(member=1)
    assert made.on_decision(decide(1, [1, 2]))
    return made


def staged(core: Member, name: str = "main") -> int:
    """Enter the next operation and stage it."""
    seq = core.enter(name, "all_reduce")
    assert core.verdict(name, seq) == Run(core.epoch)
    assert core.stage(name, seq, core.epoch)
    return seq


def done(core: Member, name: str = "main") -> int:
    """Run the next operation to its end."""
    seq = staged(core, name)
    assert core.complete(name, seq, core.epoch)
    core.exit(name, seq)
    return seq


def fence(core: Member, epoch: int) -> Report:
    """Promise a number."""
    (report,) = core.on_prepare(Prepare(epoch, [1, 2]))
    assert isinstance(report, Report)
    return report


def test_an_operation_runs_stages_completes(core: Member) -> None:
    seq = staged(core)
    assert core.complete("main", seq, 1)
    assert core.verdict("main", seq) == Completed(1)
    core.exit("main", seq)
    assert core.enter("main", "all_reduce") == seq + 1


def test_a_lane_takes_one_operation_at_a_time(core: Member) -> None:
    core.enter("main", "all_reduce")
    with pytest.raises(AssertionError):
        core.enter("main", "all_reduce")
    core.enter("side", "all_reduce")


def test_nothing_stages_or_completes_behind_a_fence(core: Member) -> None:
    first, second = staged(core), core.enter("side", "all_reduce")
    fence(core, 2)
    assert not core.complete("main", first, 1)
    assert not core.stage("side", second, 1)
    assert core.verdict("main", first) == Wait()


def test_nothing_of_an_older_epoch_stages_or_completes(core: Member) -> None:
    seq = staged(core)
    fence(core, 2)
    core.on_decision(decide(2, [1, 2], {"main": LaneFrontier(0, 0, 1)}))
    assert not core.stage("main", seq, 1)
    assert not core.complete("main", seq, 1)
    assert core.verdict("main", seq) == Run(2)
    assert core.stage("main", seq, 2)
    assert not core.complete("main", seq, 1)
    assert core.complete("main", seq, 2)


def test_the_report_says_what_is_complete_staged_entered_and_left(core: Member) -> None:
    done(core)
    staged(core)
    core.enter("side", "barrier")
    lanes = fence(core, 2).lanes
    main, side = lanes["main"], lanes["side"]
    assert (main.complete, main.complete_epoch, main.staged, main.staged_epoch) == (1, 1, 2, 1)
    assert (main.entered, main.left) == (2, 1)
    assert (side.complete, side.staged, side.entered, side.left) == (0, 0, 1, 0)


def test_what_all_staged_is_completed_from_staging(core: Member) -> None:
    seq = staged(core)
    fence(core, 2)
    core.on_decision(decide(2, [1, 2], {"main": LaneFrontier(seq, 1, seq)}))
    assert core.verdict("main", seq) == Completed(1)
    assert core.lane("main").view == 1


def test_a_staging_of_another_attempt_is_discarded(core: Member) -> None:
    seq = staged(core)
    fence(core, 2)
    core.on_decision(decide(2, [1, 2], {"main": LaneFrontier(0, 0, seq)}))
    fence(core, 3)
    core.on_decision(decide(3, [1, 2], {"main": LaneFrontier(seq, 1, seq)}))
    assert core.verdict("main", seq) == Run(3)


def test_staged_operations_outlive_a_change_that_is_given_up(core: Member) -> None:
    staged(core)
    assert fence(core, 2).lanes == fence(core, 3).lanes


def test_older_numbers_are_not_promised_and_the_same_is_reported_again(core: Member) -> None:
    fence(core, 5)
    assert core.on_prepare(Prepare(4, [1, 2])) == []
    assert fence(core, 5).epoch == 5
    core.on_decision(decide(5, [1, 2]))
    assert core.on_prepare(Prepare(5, [1, 2])) == []


def test_older_decisions_are_not_applied(core: Member) -> None:
    fence(core, 3)
    assert not core.on_decision(decide(2, [1, 2]))
    assert core.fenced
    assert core.on_decision(decide(3, [1, 2]))
    assert not core.on_decision(decide(3, [1, 2]))
    assert not core.on_decision(decide(1, [1, 2]))
    assert core.epoch == 3


def test_a_decision_without_us_is_not_ours(core: Member) -> None:
    assert not core.on_decision(decide(2, [2, 3]))
    assert core.epoch == 1


def test_a_joiner_counts_on_from_the_frontier() -> None:
    joiner = Member(member=3)
    fence(joiner, 4)
    joiner.on_decision(decide(4, [1, 3], {"main": LaneFrontier(7, 2, 9)}, admitted=True))
    assert joiner.enter("main", "all_reduce") == 10
    assert joiner.verdict("main", 10) == Run(4)
    assert joiner.lane("main").view == 4
    assert joiner.lane("new").view == 4


@pytest.mark.parametrize(
    ("error", "kind"), [("mismatch", DescriptorMismatch), ("crossed", CrossedWaits), ("lost", MemberLost)]
)
def test_a_verdict_ends_the_operation_of_those_inside_and_of_those_to_come(
    core: Member, error: str, kind: type[RingholdError]
) -> None:
    inside = core.enter("main", "all_reduce")
    verdicts = [Verdict("main", inside, error, "so"), Verdict("side", 1, error, "so")]  # type: ignore[arg-type]
    fence(core, 2)
    core.on_decision(decide(2, [1, 2], verdicts=verdicts))
    assert isinstance(core.verdict("main", inside), kind)
    core.exit("main", inside)
    to_come = core.enter("side", "all_reduce")
    assert isinstance(core.verdict("side", to_come), kind)
    core.exit("side", to_come)
    assert core.enter("side", "all_reduce") == 2
    assert core.verdict("side", 2) == Run(2)


def test_a_verdict_on_what_is_behind_us_is_forgotten(core: Member) -> None:
    seq = done(core)
    fence(core, 2)
    core.on_decision(decide(2, [1, 2], {"main": LaneFrontier(1, 1, 1)}, [Verdict("main", seq, "lost", "so")]))
    assert core.verdicts == {}


def test_the_first_verdict_stands(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    core.on_decision(decide(2, [1, 2], verdicts=[Verdict("main", seq, "mismatch", "so")]))
    core.on_decision(decide(3, [1, 2], verdicts=[Verdict("main", seq, "lost", "so")]))
    assert isinstance(core.verdict("main", seq), DescriptorMismatch)


def test_a_verdict_waits_for_the_end_of_a_change(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    core.on_decision(decide(2, [1, 2], verdicts=[Verdict("main", seq, "lost", "so")]))
    fence(core, 3)
    assert core.verdict("main", seq) == Wait()


def test_a_failed_attempt_waits_for_another_epoch(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    assert core.interrupt("main", 1, 2) == [LinkDown(1, 2)]
    assert core.verdict("main", seq) == Wait()
    fence(core, 2)
    core.on_decision(decide(2, [1, 2]))
    assert core.verdict("main", seq) == Run(2)
    assert core.interrupt("main", 1, 2) == []
    assert core.lanes["main"].interrupted == 0
    assert core.verdict("main", seq) == Run(2)


def test_an_attempt_that_was_aborted_from_here_is_no_failed_link(core: Member) -> None:
    core.enter("main", "all_reduce")
    assert core.interrupt("main", 1, 0) == []
    assert core.lanes["main"].interrupted == 1
    fence(core, 2)
    assert core.interrupt("main", 1, 2) == []
    assert core.link_down(0, 2) == []


def test_an_error_lets_the_caller_see_the_newest_members(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    core.on_decision(decide(2, [1], verdicts=[Verdict("main", seq, "lost", "so")]))
    assert core.lane("main").view == 1
    core.exit("main", seq)
    assert core.lane("main").view == 2


def test_the_view_is_that_of_the_attempt_that_completed(core: Member) -> None:
    done(core)
    core.on_decision(decide(2, [1, 3]))
    assert core.lane("main").view == 1
    done(core)
    assert core.lane("main").view == 2


def test_an_admission_moves_all_views(core: Member) -> None:
    done(core)
    done(core, "side")
    assert core.admit() == [Admit(1)]
    core.on_decision(decide(2, [1, 2, 3], {"main": LaneFrontier(1, 1, 1)}, admitted=True))
    assert core.admitting == 0
    assert {lane.view for lane in core.lanes.values()} == {2}


def test_a_safe_point_is_told_again_in_the_next_epoch(core: Member) -> None:
    core.admit()
    fence(core, 2)
    core.on_decision(decide(2, [1, 2]))
    assert core.admitting == 2
    assert list(core.outstanding.values()) == [Admit(2)]


def test_what_was_asked_is_kept_until_a_change_answers_it(core: Member) -> None:
    assert not core.needs_coordinator
    core.enter("main", "all_reduce")
    core.link_down(1, 2)
    core.complain(Differs(1, "main", 1, "a", "b", 2, False))
    assert core.stalled("main", 1) == [Stalled(1, "main", 1)]
    core.leave("why")
    assert core.needs_coordinator
    assert len(core.outstanding) == 4
    report = fence(core, 2)
    assert list(core.outstanding.values()) == [Leave("why"), report]
    core.on_decision(decide(2, [1, 2]))
    assert list(core.outstanding.values()) == [Leave("why")]


def test_a_stall_is_told_once_in_an_epoch_and_only_while_it_lasts(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    assert core.stalled("main", seq) != []
    assert core.stalled("main", seq) == []
    assert core.needs_coordinator
    core.exit("main", seq)
    assert not core.needs_coordinator
    assert core.stalled("main", seq) == []
    core.on_decision(decide(2, [1, 2]))
    seq = core.enter("main", "all_reduce")
    assert core.stalled("main", seq) == [Stalled(2, "main", seq)]
    fence(core, 3)
    assert core.stalled("main", seq) == []


@pytest.mark.parametrize(("kind", "error"), [("evicted", Evicted), ("quorum", QuorumLost), ("left", Evicted)])
def test_who_is_out_hears_it_at_every_operation_that_is_not_complete(
    core: Member, kind: str, error: type[RingholdError]
) -> None:
    complete, inside = staged(core, "side"), core.enter("main", "all_reduce")
    core.complete("side", complete, 1)
    core.on_evict(Evict(kind, "so"))  # type: ignore[arg-type]
    assert isinstance(core.verdict("main", inside), error)
    assert core.verdict("side", complete) == Completed(1)
    assert core.left == (kind == "left")
    assert not core.stage("main", inside, 1)
    assert core.on_prepare(Prepare(2, [1, 2])) == []
    assert not core.on_decision(decide(2, [1, 2]))
    assert core.link_down(1, 2) == []


def test_the_first_reason_to_be_out_stands(core: Member) -> None:
    core.fail(QuorumLost("first"))
    core.on_evict(Evict("evicted", "second"))
    assert str(core.error) == "first"


def test_members_of_old_epochs_are_forgotten_when_nothing_names_them(core: Member) -> None:
    done(core)
    core.on_decision(decide(2, [1, 2]))
    core.on_decision(decide(3, [1, 2]))
    core.forget()
    assert set(core.past) == {1, 3}
    done(core)
    core.forget()
    assert set(core.past) == {3}
    assert core.members == (1, 2)


def test_heartbeats_tell_what_the_lanes_do(core: Member) -> None:
    done(core)
    core.enter("side", "barrier")
    rows = core.statuses()
    assert [(r.lane, r.seq, r.kind, r.phase) for r in rows] == [
        ("main", 1, "all_reduce", "idle"),
        ("side", 1, "barrier", "waiting"),
    ]


def test_a_failed_link_and_a_fence_each_need_the_coordinator(core: Member) -> None:
    core.enter("main", "all_reduce")
    assert core.interrupt("main", 1, 0) == []  # closed from here: there is nothing to ask
    assert not core.outstanding
    assert core.needs_coordinator
    fence(core, 2)
    core.outstanding.clear()
    assert core.decision is not None
    core.lanes["main"].interrupted = 0
    assert core.needs_coordinator


def test_who_waits_for_its_first_epoch_has_the_join_timeout_for_it() -> None:
    joiner = Member(member=3)
    assert not joiner.left
    fence(joiner, 2)
    assert joiner.fenced
    assert not joiner.needs_coordinator


def test_what_ended_by_an_error_is_not_staged_any_more(core: Member) -> None:
    seq = staged(core)
    core.exit("main", seq)
    (row,) = fence(core, 2).lanes.values()
    assert (row.complete, row.staged, row.staged_epoch, row.left) == (0, 0, 0, 1)


def test_what_is_completed_from_staging_keeps_the_view_of_its_attempt(core: Member) -> None:
    seq = staged(core)
    core.on_decision(decide(2, [1, 3], {"main": LaneFrontier(seq, 1, seq)}))
    core.exit("main", seq)
    assert core.lane("main").view == 1


def test_only_the_operation_that_is_under_way_can_be_stalled(core: Member) -> None:
    done(core)
    seq = core.enter("main", "all_reduce")
    assert core.stalled("main", seq - 1) == []
    assert core.stalled("main", seq + 1) == []
    assert core.stalled("main", seq) == [Stalled(1, "main", seq)]


def test_an_attempt_of_another_epoch_interrupts_nothing(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    for epoch in (0, 2):
        assert core.interrupt("main", epoch, 2) == []
        assert core.link_down(epoch, 2) == []
    assert core.lanes["main"].interrupted == 0
    assert core.verdict("main", seq) == Run(1)


def test_a_farewell_fits_into_a_message(core: Member) -> None:
    (bye,) = core.leave("x" * 3000)
    assert decode_from_peer(encode(bye)) == Leave("x" * 2000)


def test_errors_tell_the_survivors(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    core.on_decision(decide(2, [1, 3], verdicts=[Verdict("main", seq, "lost", "so")]))
    error = core.verdict("main", seq)
    assert isinstance(error, MemberLost)
    assert error.survivors == (1, 3)
    assert core.lost == frozenset()
    core.on_decision(msgspec.structs.replace(decide(3, [1]), lost=[3]))
    core.on_decision(msgspec.structs.replace(decide(4, [1]), lost=[4]))
    assert core.lost == {3, 4}


def test_nothing_is_complete_that_was_not_staged(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    assert not core.complete("main", seq, 1)
    assert not core.stage("main", seq, 2)
    assert core.stage("main", seq, 1)
    assert not core.complete("main", seq + 1, 1)
    assert not core.complete("main", seq - 1, 1)
    assert core.complete("main", seq, 1)
    assert not core.complete("main", seq, 1)


def test_a_verdict_on_what_is_behind_us_is_no_matter_inside_of_the_next(core: Member) -> None:
    seq = done(core)
    core.enter("main", "all_reduce")
    core.on_decision(decide(2, [1, 2], verdicts=[Verdict("main", seq, "lost", "so")]))
    assert core.verdicts == {}


def test_what_is_under_way_is_not_left(core: Member) -> None:
    for _ in range(3):
        done(core)
    core.enter("main", "all_reduce")
    (row,) = fence(core, 2).lanes.values()
    assert (row.entered, row.left) == (4, 3)


def test_a_decision_answers_all_that_was_asked_but_a_farewell(core: Member) -> None:
    core.complain(Differs(1, "main", 1, "a", "b", 2, False))
    core.link_down(1, 2)
    core.leave("why")
    core.on_decision(decide(2, [1, 2]))
    assert list(core.outstanding) == ["leave"]


def test_every_verdict_of_a_decision_counts(core: Member) -> None:
    seq = core.enter("main", "all_reduce")
    core.lanes["main"].waiting_for = 2
    core.on_decision(
        decide(2, [1, 2], verdicts=[Verdict("g", 1, "disputed", "so"), Verdict("main", seq, "lost", "so")])
    )
    assert isinstance(core.verdict("main", seq), MemberLost)
    with pytest.raises(DescriptorMismatch):
        core.enter("g", "all_reduce")
    core.exit("main", seq)
    assert core.lanes["main"].waiting_for == 0
