"""The churn schedule: what can be written, who is chosen, and what is refused up front."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.errors import UsageError
from launch.faults import Fault, draw, parse, plan

POINTS = ("transfer", "reduce", "staged", "confirm")


def test_parse() -> None:
    text = "stop@20:1, kill@12,join@25,coordinator@12,leave@30"
    assert [str(fault) for fault in parse(text)] == ["kill@12", "coordinator@12", "stop@20:1", "join@25", "leave@30"]
    assert parse("") == ()


@pytest.mark.parametrize(
    "item", ["kill", "kill@", "kill@x", "kill@-1", "boom@3", "kill@3:", "kill@3:a", "@3", "coordinator@3:1"]
)
def test_what_cannot_be_read_is_named(item: str) -> None:
    with pytest.raises(UsageError, match="--churn item"):
        parse(f"join@1,{item}")


def test_the_seed_decides_the_victims() -> None:
    faults = parse("kill@2,stop@3,join@4,kill@5,coordinator@6")
    plans = [plan(faults, 4, 10, seed, points=POINTS) for seed in range(20)]
    assert plans == [plan(faults, 4, 10, seed, points=POINTS) for seed in range(20)]
    assert len({planned[0].slot for planned in plans}) == 4
    assert len({planned[0].point for planned in plans}) == 4
    assert all(planned[2].slot == 4 for planned in plans)
    assert all(planned[4].slot is None for planned in plans)


def test_a_named_target_is_taken() -> None:
    assert plan(parse("kill@2:1"), 3, 10, 0, points=POINTS)[0].slot == 1
    with pytest.raises(UsageError, match="peer 1 is not there"):
        plan(parse("kill@2:1,stop@3:1"), 3, 10, 0, points=POINTS)


@pytest.mark.parametrize(
    ("text", "peers"),
    [("kill@2", 1), ("kill@2,kill@3", 2), ("stop@2,kill@2", 2), ("leave@1,kill@2,join@3", 2), ("stop@2", 1)],
)
def test_a_schedule_that_leaves_nobody_is_refused(text: str, peers: int) -> None:
    with pytest.raises(UsageError, match="would leave nobody"):
        plan(parse(text), peers, 10, 0, points=POINTS)


def test_a_schedule_that_leaves_somebody_is_taken() -> None:
    assert len(plan(parse("kill@2,join@3,kill@4,stop@5,kill@6"), 3, 10, 0, points=POINTS)) == 5


@pytest.mark.parametrize("text", ["kill@0", "kill@10", "join@11"])
def test_a_fault_outside_the_run_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot strike"):
        plan(parse(text), 3, 10, 0, points=POINTS)


def test_under_a_launcher_a_join_brings_a_killed_peer_back() -> None:
    planned = plan(parse("kill@2,kill@3,join@4,join@5"), 4, 10, 1, points=POINTS, revive=True)
    assert {planned[0].slot, planned[1].slot} == {planned[2].slot, planned[3].slot}
    with pytest.raises(UsageError, match="none is down"):
        plan(parse("kill@2,join@3,join@4"), 4, 10, 1, points=POINTS, revive=True)


@given(
    rate=st.floats(0, 100),
    peers=st.integers(1, 6),
    steps=st.integers(3, 200),
    seed=st.integers(0, 99),
    revive=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_drawn_schedule_can_always_be_planned(rate: float, peers: int, steps: int, seed: int, revive: bool) -> None:
    faults = draw(rate, peers, steps, seed, revive)
    assert faults == draw(rate, peers, steps, seed, revive)
    assert len(plan(faults, peers, steps, seed, points=POINTS, revive=revive)) == len(faults)


def test_the_rate_is_per_100_steps() -> None:
    counts = [len(draw(10, 4, 1000, seed)) for seed in range(20)]
    assert 80 < sum(counts) / len(counts) < 120
    with pytest.raises(UsageError, match="per 100 steps"):
        draw(101, 4, 100, 0)


def test_a_fault_reads_as_it_was_written() -> None:
    assert str(Fault("kill", 3, 1)) == "kill@3:1"
