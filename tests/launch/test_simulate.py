"""`ringhold simulate`: its table, JSON and chart, and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from collectives import choice
from launch import console
from launch.cli import ringhold

FOLDER = Path(__file__).parents[2] / "examples" / "topologies"
HOSTS = str(FOLDER / "hosts.json")


def simulate(*arguments: str) -> int:
    return console.run(ringhold, ["simulate", *arguments])


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert simulate(*arguments, "--json") == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_one_algorithm_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, "all_reduce", "--algorithm", "ring", "--ranks", "8", "--size", "1M", "--topology", HOSTS)
    assert (report["kind"], report["ranks"]) == ("all_reduce", 8)
    (result,) = report["results"]
    assert (result["algorithm"], result["size"], result["exact"]) == ("ring", 2**20, True)
    assert result["time"] == pytest.approx(14 * (2e-6 + 2**20 / 8 / 200e9))
    assert result["busbw"] == pytest.approx(2**20 / result["time"] * 7 / 4)
    assert 0 < result["busiest_load"] <= 1


@pytest.mark.parametrize("kind", choice.kinds())
def test_all_algorithms_are_compared(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, kind, "--algorithm", "all", "--ranks", "16", "--size", "64K", "--topology", HOSTS)
    assert [result["algorithm"] for result in report["results"]] == list(choice.names(kind))
    assert {result["size"] for result in report["results"]} == {64 * 1024}


def test_the_table_names_the_busiest_link(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("all_reduce", "--size", "64K,1M", "--topology", HOSTS) == 0
    shown = capsys.readouterr().out
    for word in ("32 ranks", "64 KiB", "1 MiB", "host 0 up", "busbw", "each message"):
        assert word in shown


def test_a_chart_has_a_line_for_each_algorithm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.svg"
    assert simulate("broadcast", "--algorithm", "all", "--size", "1M", "--topology", HOSTS, "--plot", str(path)) == 0
    drawing = ElementTree.fromstring(path.read_text())
    lines = drawing.findall(".//{*}polyline")
    assert len(lines) == len(choice.names("broadcast"))
    assert {len(line.attrib["points"].split()) for line in lines} == {8}
    texts = [text.text for text in drawing.findall(".//{*}text")]
    assert {*choice.names("broadcast"), "1 MiB", "64 KiB", "size", "time"} <= set(texts)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("all_reduce", "--algorithm", "nope"), "'nope'"),
        (("all_reduce", "--ranks", "33"), "has 32 ranks"),
        (("gossip",), "'gossip'"),
        (("all_reduce", "--size", "1X"), "'1X'"),
        (("all_reduce", "--size", "1M,"), "is no size"),
        (("all_reduce", "--segment", "0"), "must be positive"),
        (("broadcast", "--root", "32"), "32"),
        (("all_reduce", "--topology", "/nowhere.json"), "nowhere.json"),
        (("all_reduce", "--topology", str(Path(__file__))), "test_simulate.py"),
        (("all_reduce", "--plot", "/nowhere/times.svg", "--size", "4K"), "/nowhere/times.svg"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "--topology" in arguments else (*arguments, "--topology", HOSTS)
    assert simulate(*given) == 2
    error = capsys.readouterr().err
    assert error.startswith("ringhold: error: ")
    assert why in error
    assert "Traceback" not in error
