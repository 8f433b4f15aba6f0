"""Runs that go on elsewhere: saved, killed, resumed by other peers from other layouts, with the losses of no break."""

import json
from pathlib import Path
from typing import Any

import pytest

import checkpoint
from collectives.errors import UsageError
from collectives.state import state_hash
from launch import checkpoints, finals, reference
from launch.config import JobConfig
from tests.harness.cluster import Cluster
from tests.launch.spread import through
from tests.launch.test_job import run, tiny
from tests.launch.test_train import finish, start

STEPS = ("--dtype", "fp64", "--lr", "1e-3", "--json", "--reference")


def train(out: Path, *arguments: str) -> dict[str, Any]:
    """Run the command to a good end; its summary."""
    code, text, err = finish(start(out, *STEPS, *arguments))
    assert code == 0, text + err
    summary: dict[str, Any] = json.loads(text)
    return summary


def test_four_peers_then_three_then_two_with_the_losses_of_no_break(tmp_path: Path) -> None:
    first, spread, second = (str(tmp_path / name) for name in ("first", "spread", "second"))
    often = ("--checkpoint-every", "3")
    train(tmp_path / "a", "--peers", "4", "--steps", "9", "--churn", "kill@2", "--checkpoint", first, *often)
    # At rest it passes through a mesh of another shape, and nothing of it is lost.
    with Cluster(founders=4) as cluster:
        parts = cluster.run(through, 4, source=f"{first}@6", target=spread)
    assert len(set(map(tuple, parts))) == 2, "each stage has parameters of its own"
    kept = checkpoints.load(f"{first}@6")
    assert state_hash(checkpoints.load(spread)) == state_hash(kept)
    assert [group["weight_decay"] for group in kept["optimizer"]["param_groups"]] == [0.1, 0.0]
    flat = ("--shard-optimizer", "--checkpoint", second, *often)
    train(tmp_path / "b", "--peers", "3", "--steps", "12", "--churn", "kill@8", "--resume", spread, *flat)
    train(tmp_path / "c", "--peers", "2", "--steps", "15", "--resume", second)
    end = finals.load(tmp_path / "c" / finals.FINAL)
    settings = {**end.details["config"], "resume": None, "decay_steps": 9, "out": str(tmp_path)}
    whole = reference.run(JobConfig.from_json(json.dumps(settings)))
    assert abs(end.details["loss"] - whole.losses[-1]) < reference.TOLERANCES["fp64"]


def test_a_state_saved_by_one_is_the_state(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    result, events = run(tiny(tmp_path / "a", steps=5, checkpoint=store, checkpoint_every=2))
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 4, 5]
    assert result is not None
    assert state_hash(checkpoints.load(store)) == result.hash
    again, _ = run(tiny(tmp_path / "b", steps=8, decay_steps=5, resume=f"{store}@2"))
    straight, _ = run(tiny(tmp_path / "c", steps=8, decay_steps=5))
    assert again is not None
    assert straight is not None
    assert again.hash == straight.hash


def test_what_is_no_state_of_a_job_is_not_resumed_from(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    checkpoint.save(store, {"model": {}, "step": 3})
    with pytest.raises(UsageError, match="it has no optimizer, schedule, rng, data, job"):
        run(tiny(tmp_path / "a", resume=store))
    run(tiny(tmp_path / "b", steps=2, checkpoint=store))
    state = checkpoints.load(store)
    state["optimizer"]["param_groups"].reverse()
    checkpoint.save(store, state, step=9)
    with pytest.raises(UsageError, match="parameter groups"):
        run(tiny(tmp_path / "c", resume=f"{store}@9"))
