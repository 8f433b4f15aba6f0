"""The coordinator's deadlines to the instant: when silence, a gap, a complaint or a stall counts, and when not yet."""

from dataclasses import replace

import pytest

from collectives.membership.protocol import Beat, LinkDown, Prepare, Stalled
from collectives.membership.stalls import Complaints, Remedy
from collectives.options import Options
from tests.membership.desk import HEARTBEAT, SILENCE, Desk, row

EARLIER, LATER = 0.01, 0.02
"""Seconds before an instant, and from there to behind it."""

PATIENCE = 30.0


def complaints() -> Complaints:
    """Nobody has complained yet."""
    return Complaints(Options(heartbeat=HEARTBEAT, heartbeat_timeout=SILENCE, op_timeout=PATIENCE))


def test_silence_counts_behind_the_whole_timeout() -> None:
    desk = Desk()
    desk.found(1, 2)
    for _ in range(3):
        desk.tick(1.0)
        desk.say(1, Beat([]))
    desk.tick(1.0)
    assert desk.core.change is None
    desk.tick(LATER)
    assert desk.preparing() == Prepare(2, [1])


@pytest.mark.parametrize(("seconds", "evicted"), [(1.9, True), (2.0, True), (2.02, False)])
def test_all_are_silent_when_nobody_was_heard_for_half_the_timeout(seconds: float, evicted: bool) -> None:
    desk = Desk(founders=3)
    desk.found(1, 2, 3)
    desk.tick(1.9)
    desk.say(1, Beat([]))
    # The others' time would end at 4 s.
    desk.tick(1.0)
    desk.tick(seconds - 1.0)
    assert desk.core.change is None
    for connection in (1, 2) if evicted else ():
        desk.say(connection, Beat([]))
    desk.tick(0.5)
    assert (desk.core.members == (1, 2)) is evicted


@pytest.mark.parametrize(("seconds", "held"), [(1.99, True), (2.0, True), (2.02, False)])
def test_a_gap_is_more_than_half_the_timeout(seconds: float, held: bool) -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.now += seconds
    desk.close(2)
    assert (desk.core.change is not None) is held


@pytest.mark.parametrize(("last", "lost"), [(1.0 - EARLIER, False), (1.0, True)])
def test_behind_the_grace_after_a_gap_a_connection_that_closes_is_a_death(last: float, lost: bool) -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.tick(10.0)
    for seconds in (1.0, 1.0, 1.0, last):
        desk.say(1, Beat([]))
        desk.say(2, Beat([]))
        desk.tick(seconds)
    desk.close(2)
    assert (desk.core.members == (1,)) is lost


def test_a_failed_link_has_a_heartbeat_in_which_its_end_may_turn_out_dead() -> None:
    made = complaints()
    assert not made
    made.link_down(1, 2, 100.0)
    assert made
    assert made.judge({1: {}, 2: {}}, 99.0, 100.0 + HEARTBEAT - EARLIER) is None
    # The other end says so later: the first word counts.
    made.link_down(1, 2, 100.5)
    assert made.judge({1: {}, 2: {}}, 99.0, 100.0 + HEARTBEAT) == Remedy()
    made.clear()
    assert not made
    made.link_down(1, 3, 100.0)
    assert made.judge({1: {}, 3: {}}, 99.0, 110.0) == Remedy()


def test_a_link_that_fails_again_costs_one_end_its_place() -> None:
    made = complaints()
    for _ in range(2):
        made.clear()
        made.link_down(1, 2, 100.0)
        remedy = made.judge({1: {}, 2: {}}, 99.0, 100.0 + HEARTBEAT)
    assert remedy == Remedy((2,), "its links to [1] failed twice")


@pytest.mark.parametrize(
    ("beaten", "now", "judged"),
    [
        (99.0, 100.0 + SILENCE, False),  # somebody has not beaten since
        (100.0, 100.0 + SILENCE, False),
        (100.1, 100.0 + SILENCE - EARLIER, False),
        (100.1, 100.0 + SILENCE, True),
        (100.1, 300.0, True),
    ],
)
def test_a_stall_is_judged_on_later_heartbeats_and_after_a_timeout(beaten: float, now: float, judged: bool) -> None:
    made = complaints()
    made.stalled(1, ("main", 2), 100.0)
    made.stalled(2, ("main", 2), 101.0)
    rows = {1: {"main": row(2)}, 2: {"main": row(1, "idle")}}
    late = Remedy((2,), "absent from operation 2 of lane 'main' for 30 s")
    assert made.judge(rows, beaten, now) == (late if judged else None)
    assert bool(made) is not judged


def test_a_stall_that_is_over_is_forgotten() -> None:
    for lanes in ({}, {"main": row(2, "idle")}, {"main": row(3)}):
        made = complaints()
        made.stalled(1, ("main", 2), 100.0)
        assert made.judge({1: lanes, 2: {"main": row(1, "idle")}}, 101.0, 110.0) is None
        assert not made


def test_a_dead_link_without_a_sound_is_mended_at_once() -> None:
    made = complaints()
    made.stalled(1, ("main", 2), 100.0)
    rows = {1: {"main": row(2, waiting_for=2)}, 2: {"main": row(2)}}
    assert made.judge(rows, 101.0, 104.0) == Remedy()


def test_a_stall_is_not_judged_before_everybody_has_beaten_once() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(1, Stalled(1, "main", 1))
    for _ in range(10):
        desk.say(1, Beat([row(1)]))
        desk.tick()
    # Member 2 goes for its silence, not for its absence.
    assert "silent for more than" in str(desk.told[2][-1])


def test_a_failed_link_is_judged_at_the_tick_behind_it() -> None:
    desk = Desk()
    desk.found(1, 2)
    desk.say(1, LinkDown(1, 2))
    desk.tick(HEARTBEAT - EARLIER)
    assert desk.core.change is None
    desk.tick(EARLIER)
    assert desk.preparing() == Prepare(2, [1, 2])


def test_half_of_an_odd_timeout() -> None:
    for seconds, waits in ((2.5, False), (2.6, True)):
        desk = Desk()
        desk.found(1, 2)
        desk.core.options = replace(desk.core.options, heartbeat_timeout=5.0)
        desk.tick(1.0)
        desk.tick(1.0)
        desk.tick(seconds - 2.0)
        # Nobody was heard for so long: is that our own network's doing?
        desk.close(2)
        assert (desk.core.members == (1, 2)) is waits
        slept = Desk()
        slept.found(1, 2)
        slept.core.options = replace(slept.core.options, heartbeat_timeout=5.0)
        slept.now += seconds
        slept.close(2)
        assert (slept.core.members == (1, 2)) is waits


def test_of_two_links_that_fail_again_the_first_is_judged() -> None:
    made = complaints()
    for _ in range(2):
        made.clear()
        made.link_down(3, 4, 100.0)
        made.link_down(1, 2, 100.0)
        remedy = made.judge({}, 99.0, 110.0)
    assert remedy == Remedy((2,), "its links to [1] failed twice")


def test_times_are_differences_however_young_the_clock_is() -> None:
    made = complaints()
    made.link_down(1, 2, 1.0)
    assert made.judge({1: {}, 2: {}}, 0.5, 3.0) == Remedy()
    desk = Desk(now=1.0)
    desk.found(1, 2)
    for _ in range(10):
        desk.tick(1.0)
    assert desk.core.members == (1, 2)
