"""Percentiles, tables and JSON for the benchmarks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed; nan of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Median, 99th percentile and maximum of times, in the unit given, rounded; None where there are none."""
    if not values:
        return {"count": 0, "p50": None, "p99": None, "max": None}
    numbers = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)}
    return {"count": len(values), **{name: round(value, 1) for name, value in numbers.items()}}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows in columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *rest = row
        right = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([f"{first:<{widths[0]}}", *right]))
    return "\n".join(lines)


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if a file was named."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
