"""Who is at fault when a link or an operation is stuck (rule R11)."""

import msgspec

from collectives.membership.protocol import LaneStatus
from collectives.membership.stalls import Judgement, judge_stall, link_to_evict, silent_links, under_way
from tests.membership.desk import row

PATIENCE = 30.0


def judge(rows: dict[int, list[LaneStatus]], lane: str = "main", seq: int = 2) -> Judgement:
    """Judge operation `seq` of a lane."""
    return judge_stall({m: {r.lane: r for r in lanes} for m, lanes in rows.items()}, lane, seq, PATIENCE)


def test_the_end_in_more_bad_links_goes() -> None:
    link = frozenset({1, 2})
    assert link_to_evict(link, [link, frozenset({1, 3})]) == 1
    assert link_to_evict(link, [link, frozenset({2, 3})]) == 2


def test_on_a_tie_the_higher_id_goes() -> None:
    assert link_to_evict(frozenset({1, 2}), [frozenset({1, 2})]) == 2
    assert link_to_evict(frozenset({7}), [frozenset({7})]) == 7


def test_who_has_not_come_is_absent() -> None:
    assert judge({1: [row(2)], 2: [row(1, "idle")], 3: []}) == Judgement(absent=(2, 3))


def test_nobody_outside_a_sub_group_is_absent_from_its_operation() -> None:
    of_two = msgspec.structs.replace(row(2, lane="g"), group=(1, 2))
    assert judge({1: [of_two], 2: [], 3: [], 4: [row(1)]}, "g") == Judgement(absent=(2,))
    assert judge({1: [of_two], 2: [of_two], 3: []}, "g") == Judgement(stuck=("g", 2))


def test_who_stands_in_an_earlier_operation_of_the_lane_is_not_absent() -> None:
    # Member 3 has not come to operation 1 either: members 1 and 2 wait for it, each where it stands.
    assert judge({1: [row(2)], 2: [row(1)], 3: [row(0, "idle")]}) == Judgement(absent=(3,))
    assert judge({1: [row(2)], 2: [row(1)], 3: [row(1)]}) == Judgement(stuck=("main", 1))
    assert judge({1: [row(2)], 2: [row(1, "confirming")], 3: [row(1, "idle")]}) == Judgement(stuck=("main", 1))


def test_all_are_in_it() -> None:
    assert judge({1: [row(2)], 2: [row(2)]}) == Judgement(stuck=("main", 2))


def test_two_lanes_cross() -> None:
    rows = {1: [row(2), row(4, "idle", lane="side")], 2: [row(1, "idle"), row(5, lane="side", seconds=1)]}
    assert judge(rows) == Judgement(crossed=(("main", 2), ("side", 5)))


def test_three_lanes_cross_in_a_circle() -> None:
    rows = {1: [row(1, lane="a")], 2: [row(1, lane="b")], 3: [row(1, lane="c")]}
    # Everybody waits for everybody: the circle that is found is one of them.
    found = judge(rows, "a", 1)
    assert len(found.crossed) >= 2
    assert not found.absent


def test_who_waits_in_another_lane_for_an_absent_one_is_not_absent() -> None:
    rows = {1: [row(2)], 2: [row(1, "idle"), row(5, lane="side")], 3: [row(1, "idle"), row(4, "idle", lane="side")]}
    assert judge(rows) == Judgement(absent=(3,))


def test_who_is_stuck_on_a_dead_link_in_another_lane_is_not_absent() -> None:
    side = row(5, lane="side", seconds=PATIENCE + 1)
    rows = {1: [row(2), row(5, "idle", lane="side")], 2: [row(1, "idle"), side]}
    assert judge(rows) == Judgement(stuck=("side", 5))


def test_who_merely_works_in_another_lane_is_absent() -> None:
    rows = {1: [row(2), row(5, lane="side", seconds=1)], 2: [row(1, "idle"), row(5, lane="side", seconds=1)]}
    assert judge(rows) == Judgement(absent=(2,))


def test_links_that_somebody_waits_on() -> None:
    rows = {1: {"main": row(2, waiting_for=3)}, 2: {"main": row(2)}, 3: {"main": row(2, "idle", 1)}, 4: {}}
    assert silent_links(rows, "main", 2) == [(1, 3)]
    assert silent_links({1: {"main": row(2, waiting_for=9)}}, "main", 2) == []


def test_under_way() -> None:
    assert under_way(row(2), 2)
    assert not under_way(row(2, "idle"), 2)
    assert not under_way(row(3), 2)
    assert not under_way(row(1), 2)
    assert all(under_way(row(2, phase), 2) for phase in ("confirming", "moving", "recovering"))


def test_a_link_is_silent_whichever_end_waits() -> None:
    rows = {1: {"main": row(2, waiting_for=3)}, 3: {"main": row(2, waiting_for=1)}}
    assert silent_links(rows, "main", 2) == [(1, 3), (3, 1)]


def test_who_confirms_in_another_lane_waits_there() -> None:
    side = row(5, "confirming", lane="side")
    rows = {1: [row(2)], 2: [row(1, "idle"), side], 3: [row(1, "idle"), row(4, "idle", lane="side")]}
    assert judge(rows) == Judgement(absent=(3,))
