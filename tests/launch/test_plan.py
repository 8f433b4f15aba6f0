"""`ringhold plan`: what it prints, the user's own step, pins, pages, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import console
from launch.cli import ringhold

MLP = ("plan", "--example", "mlp", "--batch", "1024", "--hidden", "128", "--mesh", "4")
STEP = """
import torch
from torch import nn

def make_step():
    with torch.device("meta"):
        model = nn.Linear(64, 32, bias=False)
        batch = torch.empty(256, 64)
    return lambda m, b: (m(b) ** 2).sum(), model, torch.optim.SGD(model.parameters(), lr=0.1), batch

def broken():
    raise ValueError("no data here")

def wrong():
    return 7

constant = 3
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = console.run(ringhold, arguments)
    out, err = capsys.readouterr()
    return code, out, err


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_json_has_placements_collectives_totals_and_the_gap(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *MLP)
    assert found["placements"]["batch"] == ["S(0)"]
    assert {each["phase"] for each in found["collectives"]} <= {"forward", "backward", "update"}
    assert all(each["mesh_axis"] == "axis0" for each in found["collectives"])
    assert found["total_bytes"] == sum(each["bytes"] for each in found["collectives"]) == 2 * 6 * 128 * 128 * 4
    assert found["loss_bytes"] == 24
    assert found["time"] > 0
    assert found["memory"] > 0
    assert 0 <= found["optimality_gap"] < 1e-5
    assert "optimal for this cost model" in found["optimality"]


def test_a_plan_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *MLP, "--explain", "--top", "3")
    assert code == 0
    for words in (
        "up.weight",
        "all_reduce",
        "predicted time",
        "predicted memory",
        "optimality",
        "apart from it the loss",
    ):
        assert words in out
    assert "data parallelism alone" in out
    assert "tensor parallelism alone" in out
    assert "number 3" in out
    assert "instead of" in out


def test_a_pin_shows_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *MLP, "--pin", "up.weight=S(0)", "--pin", "batch=B", "--explain")
    assert code == 0
    assert "without the pins" in out
    assert report(capsys, *MLP, "--pin", "up.weight=S(1)")["placements"]["up.weight"] == ["S(1)"]


def test_second_copies_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    pin = ("--pin", "up.weight=S(0)")
    alone, twice = report(capsys, *MLP, *pin), report(capsys, *MLP, *pin, "--redundancy", "1")
    assert "second_copies" not in alone
    assert twice["second_copies"] == {"tensors": ["up.weight"], "bytes": 128 * 128 * 4, "memory": 128 * 128}
    assert twice["memory"] == alone["memory"] + 128 * 128
    assert twice["time"] == pytest.approx(alone["time"] + twice["copying_time"])


def test_a_step_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(STEP)
    found = report(capsys, "plan", "--step", f"{path}:make_step", "--mesh", "dp=2")
    assert set(found["placements"]) >= {"weight", "batch"}
    assert found["mesh"] == {"dp": 2}


def test_a_page_is_whole_and_fetches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.html"
    code, _, err = run(capsys, "plan", "--example", "gpt", "--html", str(path))
    assert code == 0, err
    text = path.read_text()
    assert text.startswith("<!doctype html>")
    assert text.endswith("</html>\n")
    assert "×2" in text  # two layers, folded
    assert not any(word in text for word in ("<script", "http:", "https:", "src="))


@pytest.mark.parametrize("name", ["mixtral", "vit"])
def test_every_example_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "plan", "--example", name, "--mesh", "2")
    assert found["placements"]
    assert found["memory"] > 0


def test_a_cluster_is_planned_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "plan", "--config", "llama3-8b", "--devices", "16", "--hardware", "h100", "--batch", "64")
    assert len(found["plans"]) == 10
    assert all(plan["dp"] * plan["tp"] * plan["pp"] * plan["cp"] == 16 for plan in found["plans"])
    assert all(plan["loses_to_the_one_before_by"] for plan in found["plans"][1:])
    code, out, _ = run(capsys, "plan", "--config", "llama3-8b", "--devices", "8", "--batch", "64", "--top", "2")
    assert code == 0
    assert "the best" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("plan", 2, "say what to plan for"),
        ("plan --example mlp --config llama3-8b", 2, "one of"),
        ("plan --example nonesuch", 2, "mlp"),
        ("plan --example mlp --mesh 0", 2, "no mesh"),
        ("plan --example mlp --mesh 2x2x2", 2, "one or two"),
        ("plan --example mlp --mesh dp=2,dp=2", 2, "one name"),
        ("plan --example mlp --pin up.weight", 2, "NAME=PLACEMENTS"),
        ("plan --example mlp --pin up.weight=X", 2, "no placement"),
        ("plan --example mlp --pin up.weight=S(5)", 2, "cannot be so"),
        ("plan --example mlp --pin none.weight=B", 2, "no tensor of that name"),
        ("plan --example mlp --pin up.weight=S(0),B", 2, "as many placements"),
        ("plan --example mlp --memory 1K", 1, "no plan"),
        ("plan --example mlp --memory lots", 2, "no size"),
        ("plan --example mlp --devices 8", 2, "--mesh"),
        ("plan --example mlp --hardware h100 --profile x.json", 2, "one of them"),
        ("plan --example mlp --profile /nowhere.json", 2, "cannot read"),
        ("plan --example mlp --html /nowhere/x.html", 2, "--html"),
        ("plan --step nowhere.py:make", 2, "no Python file"),
        ("plan --step nowhere", 2, "FILE:FUNCTION"),
        ("plan --config llama3-8b", 2, "--devices"),
        ("plan --config llama3-8b --devices 7919 --batch 64", 2, "nothing divides"),
        ("plan --config llama3-405b --devices 8 --batch 64", 1, "none of"),
        ("plan --config llama3-8b --devices 8 --mesh 4", 2, "--devices"),
        ("plan --config llama3-8b --devices 8 --pin x=B", 2, "--pin is for"),
        ("plan --step train.py:make --batch 8", 2, "--batch is not for --step: the step has sizes of its own"),
        ("plan --example mlp --layers 3", 2, "--layers is not for --example mlp: it takes --hidden and --batch"),
        ("plan --example vit --seq 64", 2, "--seq is not for --example vit: it takes --batch"),
        ("plan --config llama3-8b --devices 8 --redundancy 1", 2, "--redundancy is for"),
        ("plan --example mlp --redundancy 2", 2, "redundancy"),
    ],
)
def test_what_cannot_be_planned(arguments: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, out, err = run(capsys, *arguments.split())
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "ValueError: no data here"),
        ("wrong", "must return a Step, or loss function, model, optimizer and batch, not a int"),
        ("constant", "no function"),
        ("none", "no function"),
    ],
)
def test_steps_that_are_none(function: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(STEP)
    code, _, err = run(capsys, "plan", "--step", f"{path}:{function}")
    assert code == 2
    assert message in err


OUTSIDER = """
import beside
import sys
import torch
from torch import nn

print("loading data")
weights = torch.ones(4)

def make_step():
    print("building")
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    loss = lambda m, b: torch.fft.rfft(torch.fft.rfft(m(b)).abs()).abs().sum()
    return [loss, model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 8)]

def leaves():
    sys.exit(0)
"""


def test_a_users_file_may_print_and_import_and_is_told_what_is_not_sharded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "outsider.py"
    path.write_text(OUTSIDER)
    code, out, err = run(capsys, "plan", "--step", f"{path}:make_step", "--mesh", "x=2,y=2", "--json")
    assert code == 0, err
    assert json.loads(out)["mesh"] == {"x": 2, "y": 2}
    lines = err.splitlines()
    assert lines[:2] == ["loading data", "building"]
    told = [line for line in lines if line.startswith("ringhold: warning: aten._fft_r2c.default (node")]
    assert len(told) == 1
    assert told[0].endswith("every rank will do all of it (and 1 more like this)")
    assert "options.py" not in err
    code, _, err = run(capsys, "plan", "--step", f"{path}:leaves")
    assert code == 2
    assert "the function raised SystemExit: 0" in err
