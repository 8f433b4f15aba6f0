"""Thousands of simulated runs of the membership protocol, and the proof that they would notice a broken rule."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.membership import simulation
from tests.membership.history import THEMES, draw
from tests.membership.judge import Violation
from tests.membership.mutants import MUTANTS, SHOWN_BY, break_rule

HISTORIES = 4000
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
}
"""What the histories must have touched, so that holding means something."""


def test_every_history_holds_and_together_they_touch_everything() -> None:
    report = simulation.explore(0, HISTORIES)
    assert report.histories == HISTORIES
    assert TOUCHED - set(report.seen) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str) -> None:
    with break_rule(name):
        assert simulation.first_violation(MOST_SEEDS, SHOWN_BY.get(name, ())) >= 0


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
    assert "VIOLATION" in told.splitlines()[-2]


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
