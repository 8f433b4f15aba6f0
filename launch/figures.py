"""Percentiles of times, for the churn lab and the benchmarks."""

import math
from collections.abc import Sequence


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
