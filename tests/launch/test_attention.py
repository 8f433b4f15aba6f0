"""`ringhold attention` with real ranks: its figures, files and refusals."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch import console
from launch.attention_request import LIMIT, affordable
from launch.cli import ringhold
from launch.overlap_chart import overlap_chart

COMMAND = (sys.executable, "-m", "launch.attention", "--ranks", "2", "--seq", "256", "--heads", "4")


def test_figures_trace_and_drawing(tmp_path: Path) -> None:
    trace, drawing = tmp_path / "out.json", tmp_path / "out.svg"
    schemes = ("ring", "token_ring", "tree", "auto")
    given = ("--scheme", ",".join(schemes), "--kv-heads", "2", "--causal", "--backward", "--json", "--link", "10M")
    done = subprocess.run(
        [*COMMAND, *given, "--compute", "modelled", "--trace", str(trace), "--svg", str(drawing)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["asked"], row["pass"]) for row in rows] == list(itertools.product(schemes, ("forward", "backward")))
    for row in rows:
        assert row["ranks"] == 2 and row["correct"] and row["compute"] == "modelled"
        assert row["bytes_sent"] == row["bytes_formula"] > 0
        assert 0 <= row["max_error"] <= row["allowed_error"] < 1e-4
        assert row["time_s"] > 0 and row["predicted_s"] > 0 and row["eta"] is not None
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        assert backward["max_error"] > 0 and backward["predicted_s"] != forward["predicted_s"]
        assert backward["bytes_sent"] != forward["bytes_sent"]
    events = json.loads(trace.read_text())["traceEvents"]
    left = {event["id"] for event in events if event["ph"] == "s"}
    assert {event["id"] for event in events if event["ph"] == "f"} <= left and left
    assert {event["pid"] for event in events if event.get("args", {}).get("kernel")} >= {1, 2}
    assert ElementTree.parse(drawing).getroot().get("aria-label") == "auto, 2 ranks, 256 rows"
    assert "http://" not in drawing.read_text().replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    "given, why",
    [
        (["--scheme", "star"], "--scheme star"),
        (["--kv-heads", "3"], "--kv-heads 3 must divide"),
        (["--seq", "3"], "too short"),
        (["--ranks", "3", "--scheme", "usp"], "do not divide 3 ranks"),
        (["--ratio", "0"], "--ratio"),
        (["--link", "0"], "--link must be positive"),
        (["--topology", "/nowhere.json"], "no such file"),
    ],
)
def test_misuse_is_refused(given: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["attention", *given]) == 2
    assert why in capsys.readouterr().err


def test_what_is_checked_is_affordable() -> None:
    assert affordable(512, 8, 64, 1) == 512
    rows = affordable(10**6, 32, 64, 1)
    assert rows > 1024 and 4 * rows * rows * 32 * 64 <= LIMIT


def test_a_drawing_shows_the_last_operation_alone() -> None:
    events = []
    for seq, start in ((1, 0.0), (2, 1000.0)):
        for pid in (1, 2):
            where = {"pid": pid, "tid": 1}
            events += [
                {"ph": "X", "name": "redistribute", "ts": start, "dur": 900.0, "args": {"seq": seq}, **where},
                {"ph": "X", "name": f"attend {seq}", "ts": start + 1, "dur": 400.0, "args": {"kernel": True}, **where},
            ]
        events += [
            {"ph": "s", "name": "hop", "id": f"{seq}", "ts": start + 5, "pid": 1},
            {"ph": "f", "name": "hop", "id": f"{seq}", "ts": start + 300, "pid": 2},
        ]
    drawn = overlap_chart(events, "two")
    assert "attend 2" in drawn and "attend 1" not in drawn
    assert drawn.count('class="move"') == 2  # one of them in the legend
