"""`ringhold signatures`: what it prints, and its exit codes."""

import json
from collections.abc import Iterator

import pytest

from launch import console
from launch.cli import ringhold
from parallel.graph import Node
from parallel.signatures import table
from parallel.signatures.signature import Signature
from parallel.signatures.table import linear

QUICK = ["--worlds", "2", "--meshes", ""]


def test_the_table_of_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["signatures", "softmax", "relu", *QUICK]) == 0
    lines = capsys.readouterr().out
    assert "_log_softmax_backward_data.default" in lines
    assert "leaky_relu.default" in lines
    assert "einsum" not in lines
    assert "0 do not" in lines


def test_json_tells_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["signatures", "erfc", *QUICK, "--search", "--json"]) == 0
    (operation,) = json.loads(capsys.readouterr().out)["operations"]
    assert operation["operation"] == "aten.erfc.default"
    assert operation["sound"] == 3
    assert operation["unsound"] == []
    assert operation["missing"] == ["P(max) -> P(min)", "P(min) -> P(max)"]


def test_markdown_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["signatures", "erfc", "--worlds", "", "--meshes", "2x2", "--markdown"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.count("|") for row in rows] == [7, 7, 7]


def test_an_unsound_signature_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(node: Node, _parts: int) -> Iterator[Signature]:
        yield from linear(node, "p")

    monkeypatch.setitem(table.TABLE, "aten.erfc.default", table.Entry("elementwise", wrong))
    assert console.run(ringhold, ["signatures", "erfc", *QUICK]) == 1
    assert "aten.erfc.default(5x1x4): P -> P on 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nothing"], "no operation and no family is called 'nothing'; families are attention"),
        (["--worlds", "1"], "numbers of ranks such as 2,3,4"),
        (["--worlds", "2x2"], "numbers of ranks such as 2,3,4"),
        (["--meshes", "4"], "meshes such as 2x2,2x3"),
    ],
)
def test_usage(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["signatures", *arguments]) == 2
    assert word in capsys.readouterr().err
