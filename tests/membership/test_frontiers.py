"""Where a lane goes on (rule R3), from any combination of reports."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from collectives.membership.frontiers import frontiers, given_up
from collectives.membership.protocol import LaneFrontier, LaneReport


def lane(complete: int, staged: int = 0, complete_epoch: int = 1, staged_epoch: int = 1, left: int = 0) -> LaneReport:
    """A report; an operation that is staged or left has been entered."""
    entered = max(complete, staged, left)
    return LaneReport(complete, complete_epoch if complete else 0, staged, staged_epoch if staged else 0, entered, left)


def frontier(*rows: LaneReport) -> LaneFrontier:
    """The frontier of one lane."""
    return frontiers({member: {"main": row} for member, row in enumerate(rows, start=1)})["main"]


def test_the_highest_complete_operation() -> None:
    assert frontier(lane(3, 4), lane(4)) == LaneFrontier(4, 1, 4)


def test_one_more_if_all_staged_that_attempt() -> None:
    assert frontier(lane(3, 4, staged_epoch=2), lane(3, 4, staged_epoch=2)) == LaneFrontier(4, 2, 4)


def test_not_if_one_has_not_staged_it() -> None:
    assert frontier(lane(3, 4), lane(3)) == LaneFrontier(3, 1, 4)


def test_not_if_they_staged_different_attempts() -> None:
    assert frontier(lane(3, 4, staged_epoch=1), lane(3, 4, staged_epoch=2)).complete == 3


def test_not_if_one_never_used_the_lane() -> None:
    assert frontiers({1: {"main": lane(0, 1)}, 2: {}})["main"] == LaneFrontier(0, 0, 1)


def test_an_alone_survivor_completes_what_it_staged() -> None:
    assert frontier(lane(3, 4)) == LaneFrontier(4, 1, 4)


def test_nobody_reports_anything() -> None:
    assert frontiers({}) == {}
    assert frontiers({1: {}, 2: {}}) == {}


def test_lanes_are_apart() -> None:
    lanes = frontiers({1: {"a": lane(3), "b": lane(1, 2)}, 2: {"a": lane(3), "b": lane(1, 2)}})
    assert {name: f.complete for name, f in lanes.items()} == {"a": 3, "b": 2}


def in_group(row: LaneReport, *group: int) -> LaneReport:
    """The same of a sub-group's lane."""
    return msgspec.structs.replace(row, group=group)


def test_an_outsider_does_not_hold_a_sub_groups_lane_back() -> None:
    reports = {1: {"g": in_group(lane(3, 4), 1, 2)}, 2: {"g": in_group(lane(3, 4), 1, 2)}, 3: {"main": lane(9)}}
    assert frontiers(reports)["g"] == LaneFrontier(4, 1, 4, (1, 2))
    assert given_up(reports, frontiers(reports)) == []


def test_a_member_of_a_sub_group_that_never_entered_holds_its_lane_back() -> None:
    assert frontiers({1: {"g": in_group(lane(0, 1), 1, 2)}, 2: {}, 3: {}})["g"] == LaneFrontier(0, 0, 1, (1, 2))


def test_dead_members_of_a_sub_group_do_not_hold_its_lane_back() -> None:
    assert frontiers({1: {"g": in_group(lane(3, 4), 1, 2)}, 3: {}})["g"].complete == 4


def test_what_one_has_left_by_an_error_is_lost_for_the_others() -> None:
    reports = {1: {"main": lane(2, left=4)}, 2: {"main": lane(2, left=2)}}
    assert [(v.lane, v.seq, v.error) for v in given_up(reports, frontiers(reports))] == [
        ("main", 3, "lost"),
        ("main", 4, "lost"),
    ]


def test_what_all_have_left_needs_no_verdict() -> None:
    reports = {1: {"main": lane(2, left=4)}, 2: {"main": lane(2, left=4)}}
    assert given_up(reports, frontiers(reports)) == []


def test_what_was_left_by_a_result_is_complete() -> None:
    reports = {1: {"main": lane(3, left=3)}, 2: {"main": lane(2, 3, left=2)}}
    assert given_up(reports, frontiers(reports)) == []


attempts = st.tuples(st.integers(0, 3), st.integers(1, 3))


@given(st.lists(st.tuples(attempts, st.booleans()), min_size=1, max_size=5), st.integers(0, 5))
def test_nothing_is_complete_that_somebody_has_neither_completed_nor_staged(
    stagings: list[tuple[tuple[int, int], bool]], base: int
) -> None:
    """Everybody completed `base`; some have staged something behind it, by any attempt."""
    rows = [lane(base, base + seq if stages else 0, staged_epoch=epoch) for (seq, epoch), stages in stagings]
    found = frontier(*rows)
    assert found.complete >= base
    for row in rows:
        attempt = (found.complete, found.complete_epoch)
        assert found.complete <= row.complete or (row.staged, row.staged_epoch) == attempt
