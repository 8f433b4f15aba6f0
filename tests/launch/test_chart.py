"""Charts: what is drawn where, names that do not overlap, and what cannot be drawn."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from collectives.errors import UsageError
from launch import units
from launch.chart import HEIGHT, WIDTH, line_chart


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def places(drawing: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    """The points of each line in pixels."""
    found = {}
    for group in drawing.findall("{*}g"):
        name, line = group.findtext("{*}title"), group.find("{*}polyline")
        assert name is not None and line is not None
        found[name] = [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]
    return found


def test_points_lie_in_the_picture_and_in_order() -> None:
    series = {"a": [(1, 10), (10, 100), (100, 1000)], "b": [(1, 1000), (10, 100), (100, 10)]}
    lines = places(drawn(line_chart(series, "title", "x", "y", log_x=True, log_y=True)))
    for line in lines.values():
        assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in line)
        steps = [right[0] - left[0] for left, right in pairwise(line)]
        assert steps[0] == pytest.approx(steps[1], abs=0.2)  # decades are alike
    assert [y for _, y in lines["a"]] == sorted((y for _, y in lines["a"]), reverse=True)
    assert lines["a"][1] == lines["b"][1]


def test_names_stand_apart_however_close_the_lines_end() -> None:
    series = {f"line {number}": [(0.0, 0.0), (1.0, 1.0 + number / 1000)] for number in range(12)}
    drawing = drawn(line_chart(series, "t", "x", "y"))
    heights = sorted(float(text.attrib["y"]) for text in drawing.findall("{*}text") if "line" in (text.text or ""))
    assert len(heights) == 12
    assert min(b - a for a, b in pairwise(heights)) >= 16.9
    assert heights[0] > 0
    assert heights[-1] < HEIGHT


def test_text_is_escaped_and_nothing_is_fetched() -> None:
    text = line_chart({"<a&b>": [(1, 1)]}, 'T "<>"', "x<", "y&")
    names = [element.text for element in drawn(text).iter()]
    assert "<a&b>" in names
    assert 'T "<>"' in names
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?:href|src|url|script|import)\b", text) == []


@pytest.mark.parametrize("log", [False, True])
def test_a_single_point_has_axes_too(log: bool) -> None:
    (place,) = places(drawn(line_chart({"a": [(5, 7)]}, "t", "x", "y", log, log)))["a"]
    assert all(map(math.isfinite, place))


@pytest.mark.parametrize(
    ("series", "log", "why"),
    [
        ({}, False, "points"),
        ({"a": []}, False, "points"),
        ({"a": [(1, math.nan)]}, False, "finite"),
        ({"a": [(0, 1), (1, 1)]}, True, "logarithmic"),
        ({"a": [(1, -1)]}, True, "logarithmic"),
    ],
)
def test_what_cannot_be_drawn_is_refused(series: dict[str, list[tuple[float, float]]], log: bool, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        line_chart(series, "t", "x", "y", log, log)


def test_numbers_carry_their_units() -> None:
    assert [units.size(value) for value in (0, 100, 1024, 1.5 * 2**20, 2**30, 2**40)] == [
        "0 B",
        "100 B",
        "1 KiB",
        "1.5 MiB",
        "1 GiB",
        "1024 GiB",
    ]
    seconds = (0, 5e-9, 3.2e-6, 9.999e-4, 0.012, 1.5, 1234)
    assert [units.duration(value) for value in seconds] == [
        "0 ns",
        "5 ns",
        "3.2 µs",
        "1 ms",
        "12 ms",
        "1.5 s",
        "1234 s",
    ]
    assert [units.rate(value) for value in (12.5e9, 1e9, 25e6, 10)] == ["12.5 GB/s", "1 GB/s", "25 MB/s", "10 B/s"]
