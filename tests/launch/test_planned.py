"""The training job by plan: sharded as the planner finds, a peer killed, and still the reference's losses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from collectives.errors import UsageError
from collectives.state import state_hash
from launch import checkpoints, data, planned, train
from launch.config import JobConfig
from launch.narrate import Narrator
from launch.trainer import Trainer
from parallel.layout import Broadcast, Mesh, Split
from tests.launch.test_train import finish, start

PLAN = ["--plan", "auto", "--redundancy", "1"]


@pytest.mark.timeout(330)
def test_a_planned_run_outlives_a_death_with_the_numbers_of_one_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = ("--preset", "1m", "--batch", "16", "--context", "64", "--peers", "3", "--steps", "5", "--dtype", "fp64")
    patience = ("--timeout", "280", "--stall-timeout", "200")
    store = tmp_path / "store"
    saving = ("--checkpoint", str(store), "--checkpoint-every", "3")
    popen = start(out, *sizes, *PLAN, *patience, *saving, "--churn", "kill@2:1", "--reference", "--json")
    code, text, err = finish(popen, timeout=300.0)
    assert code == 0, text + err
    summary = json.loads(text)
    assert summary["ok"]
    assert summary["steps"] == 5
    assert len(summary["hashes"]) == 2
    assert [fault["fault"] for fault in summary["faults"]] == ["kill"]
    assert " of " in summary["faults"][0]["detail"]
    reference = next(check for check in summary["checks"] if check["name"] == "reference")
    assert reference["ok"]
    assert "5 losses within" in reference["detail"]
    trainer = Trainer(JobConfig(preset="1m", dtype="fp64"), data.load((), 64, 16))
    trainer.absorb(checkpoints.load(f"{store}@3"))
    assert trainer.step == 3
    trainer.absorb(checkpoints.load(str(store)))
    assert state_hash(trainer.state()) in summary["hashes"].values()


def test_what_was_lost_with_a_member_comes_from_the_last_checkpoint(tmp_path: Path) -> None:
    out, store = tmp_path / "run", tmp_path / "store"
    sizes = ("--preset", "1m", "--batch", "8", "--context", "32", "--peers", "2", "--steps", "5", "--dtype", "fp64")
    sharded = ("--plan", "auto", "--pin", "blocks.0.mlp_in.weight=S(0)")
    saving = ("--checkpoint", str(store), "--checkpoint-every", "3")
    popen = start(out, *sizes, *sharded, *saving, "--churn", "kill@4:1", "--reference", "--json")
    code, text, err = finish(popen, timeout=200.0)
    assert code == 0, text + err
    summary = json.loads(text)
    assert [fault["fault"] for fault in summary["faults"]] == ["kill"]
    told = [line for line in (out / "run.jsonl").read_text().splitlines() if '"reloaded"' in line]
    assert len(told) == 1
    entry = json.loads(told[0])
    assert (entry["step"], entry["was"] > 3 and entry["lost"] > 0, entry["url"]) == (3, True, str(store))
    assert "all go on from the checkpoint of step 3" in str(Narrator().tell(entry))
    checks = {check["name"]: check for check in summary["checks"]}
    assert "taken again from a checkpoint" in checks["ledger"]["detail"]
    assert "5 losses within" in checks["reference"]["detail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "2by2"], "plan is auto or a mesh such as 2x2, not '2by2'"),
        (["--redundancy", "1"], "pins and redundancy belong to a plan"),
        (["--pin", "tokens=S(0)"], "pins and redundancy belong to a plan"),
        (["--plan", "auto", "--pin", "tokens"], "write NAME=PLACEMENTS, as in batch.0=S(0)"),
        (["--plan", "auto", "--reproducible"], "drop --plan or --reproducible"),
        (["--plan", "auto", "--churn", "join@3"], "may be killed, but none joins or comes back"),
        (["--plan", "auto", "--restart"], "may be killed, but none joins or comes back"),
    ],
)
def test_options_that_contradict_a_plan_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(train.command, ["--out", str(tmp_path / "run"), *arguments], standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


def test_the_mesh_follows_the_members() -> None:
    assert planned.mesh_of("2x2", 4) == Mesh.of(x=2, y=2)
    assert planned.mesh_of("2x2", 3) == Mesh.of(x=3)
    assert planned.mesh_of("auto", 4) == Mesh.of(x=4)
    assert planned.placed("S(0),B", Mesh.of(x=2, y=2)) == (Split(0), Broadcast())
    assert planned.placed("S(0),B", Mesh.of(x=3)) == (Split(0),)
    with pytest.raises(UsageError, match="needs as many placements"):
        planned.placed("S(0)", Mesh.of(x=2, y=2))
    assert JobConfig.from_json(JobConfig(plan="2x2", pins={"tokens": "S(0)"}).to_json()).pins == {"tokens": "S(0)"}


def test_it_is_told_where_state_came_from_once_for_all_members() -> None:
    narrator = Narrator()
    carried = {"type": "carried", "step": 4, "epoch": 2, "tensors": 28, "copies": 2}
    assert narrator.tell({"source": "peer-0", **carried}) == (
        "step 4: 28 tensors of state come from the survivors' memory, 2 of them from second copies of what was lost"
    )
    assert narrator.tell({"source": "peer-1", **carried}) is None
    assert narrator.tell({"source": "peer-0", **carried, "epoch": 3, "copies": 0}) == (
        "step 4: 28 tensors of state come from the survivors' memory"
    )
