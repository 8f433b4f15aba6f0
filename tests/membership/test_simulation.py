"""Thousands of simulated runs of the membership protocol, and the proof that they would notice a broken rule."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from collectives.options import Options
from tests.membership import simulation
from tests.membership.branches import watch
from tests.membership.history import COORDINATOR_POINTS, HOST_POINTS, THEMES, History, Spec, draw
from tests.membership.judge import Violation
from tests.membership.mutants import MUTANTS, SHOWN_BY, break_rule
from tests.membership.shrink import failure, shrink
from tests.membership.world import World

HISTORIES = 4000
WATCHED = 900
"""The first of them, which must take every branch of the two state machines but for rare ones."""
RARE = (1028, 11095)
"""Histories of what hardly any other has: a result is whole when its epoch is fenced already; the members are too few
while one of them is disconnected."""

MOST_SEEDS = 12_000
"""Seeds in which a mutant must show itself; the slowest one takes some thousands."""

TOUCHED = {
    # messages
    "Admit",
    "Alive",
    "Beat",
    "Decision",
    "Differs",
    "Evict",
    "Join",
    "Leave",
    "LinkDown",
    "Prepare",
    "Report",
    "Resume",
    "Stalled",
    "Waiting",
    "Welcome",
    # operations
    "completed from staging",
    "ran again",
    "refused by its own view",
    "differs",
    "differs by a loss",
    "skipped an older header",
    "raised MemberLost",
    "raised DescriptorMismatch",
    "raised CrossedWaits",
    "verdict lost",
    "verdict mismatch",
    "verdict crossed",
    "verdict disputed",
    "gave up inside an operation",
    # changes
    "change abandoned",
    "reported again",
    "same members",
    "joiners admitted",
    "stood at a safe point",
    "admit returned",
    "nobody left",
    "ended",
    # the coordinator's deaths, and away from it
    "restart after Opened",
    "restart after Prepared",
    "restart after Decision",
    "resumed",
    "decision ignored",
    "coordinator silent",
    "departed without the coordinator",
    # ends
    "told evicted",
    "told left",
    "told quorum",
    "left between operations",
    "left without an answer",
    "ended done",
    "ended left",
    "ended dead",
    "ended Evicted",
    "ended QuorumLost",
    "ended CoordinatorUnreachable",
    # faults, at every step of the protocol
    "came again",
    "stopped on an old journal",
    "stranger Inspect",
    "stranger Beat",
    "stranger Join",
    "stranger Alive",
    *(f"fault {what} at {point}" for what in ("crash", "stop", "partition") for point in HOST_POINTS),
    *(f"fault crash_coordinator at {point}" for point in COORDINATOR_POINTS),
    *(
        f"fault {what} at {point}"
        for what in ("cut_cable", "cut_silently")
        for point in ("sent", "staged", "confirming")
    ),
}
"""What the histories must have touched, so that holding means something."""


def test_every_history_holds_and_together_they_touch_everything() -> None:
    report = simulation.explore(0, HISTORIES)
    assert report.histories == HISTORIES
    assert TOUCHED - set(report.seen) == set()


def test_every_branch_of_the_state_machines_is_taken() -> None:
    with watch() as branches:
        simulation.explore(0, WATCHED)
        for seed in RARE:
            simulation.play(seed)
    assert len(branches.taken) > 150
    assert branches.never == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str) -> None:
    with break_rule(name):
        assert simulation.first_violation(MOST_SEEDS, SHOWN_BY.get(name, ())) >= 0


def test_a_branch_that_no_history_takes_is_told() -> None:
    with watch() as branches:
        World(History(0, "calm", Options(founders=2), [Spec("barrier")], [], [0.1, 0.2], [])).play()
    assert any("Coordinator._dissolve" in branch for branch in branches.never)
    assert any("Member.verdict" in branch for branch in branches.taken)


def test_a_failing_history_is_shrunk_to_a_test_case_that_fails() -> None:
    with break_rule("Prepare is not sent again"):
        seed = simulation.first_violation(1000)
        case = simulation.case_of(seed)
        assert len(shrink(draw(seed), lambda history: failure(history) is not None).program) <= len(draw(seed).program)
        space: dict[str, Any] = {}
        exec(case, space)
        with pytest.raises(Violation):
            space[f"test_history_of_seed_{seed}"]()
    space[f"test_history_of_seed_{seed}"]()


def test_shrinking_takes_away_all_that_is_not_needed() -> None:
    history = draw(next(seed for seed in range(500) if len(draw(seed).faults) > 2))
    needed = history.faults[1]
    small = shrink(history, lambda smaller: any(fault.what == needed.what for fault in smaller.faults))
    assert len(small.faults) == len(small.program) == len(small.arrivals) == 1
    assert not small.teams


def test_every_theme_is_drawn() -> None:
    assert {draw(seed).theme for seed in range(500)} == set(THEMES)


def test_a_violation_tells_the_seed_and_how_it_came_to_it() -> None:
    with break_rule("frontier: complete ones only"):
        seed = simulation.first_violation(100)
        with pytest.raises(Violation) as caught:
            simulation.play(seed)
    told = str(caught.value)
    assert f"--seed {seed}" in told
    assert "DECISION 1: members" in told
    assert "VIOLATION" in told
    assert f"def test_history_of_seed_{seed}() -> None:" in told


def test_a_seed_is_one_history() -> None:
    for seed in range(20):
        assert simulation.trace(seed) == simulation.trace(seed)
        assert simulation.play(seed).events == simulation.play(seed).events


def test_the_script_replays_from_any_folder(tmp_path: Path) -> None:
    script = Path(simulation.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--seed", "7", "--count", "20"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 histories held" in done.stdout
