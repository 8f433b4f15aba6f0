"""The demo, cut short: the same path, fewer steps and faults."""

import json
from pathlib import Path

import pytest

from launch import console, demo, faults, train
from launch.cli import ringhold


def test_the_schedule_is_what_the_demo_promises() -> None:
    asked = faults.parse(demo.CHURN)
    for seed in range(20):
        planned = faults.plan(asked, demo.PEERS, demo.STEPS, seed, points=train.KILL_POINTS)
        kinds = [fault.kind for fault in planned]
        assert sorted(kinds) == ["coordinator", "join", "join", "kill", "kill", "stop"]


def test_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "STEPS", 16)
    monkeypatch.setattr(demo, "CHURN", "kill@3,join@8")
    monkeypatch.setattr(demo, "PACE", 0.05)
    assert console.run(ringhold, ["demo", "--out", str(tmp_path / "demo")]) == 0
    captured = capfd.readouterr()
    for line in (
        "faults             ok",
        "reference          ok",
        "negative control   ok",
        "used exactly once",
        "PASSED",
    ):
        assert line in captured.out
    assert "results go to" in captured.err
    assert "to die in the middle of an all-reduce" in captured.err
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [fault["fault"] for fault in summary["faults"]] == ["kill", "join"]
    assert (tmp_path / "demo" / "run.jsonl").exists()
