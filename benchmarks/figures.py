"""Percentiles, tables and JSON for the benchmarks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.figures import percentile, spread

__all__ = ["percentile", "spread", "table", "write_json"]


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
