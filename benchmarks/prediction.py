"""Predictions of training at scale against published measurements, row by row (docs/prediction.md).

    python -m benchmarks.prediction               # the table, and how well it fares
    python -m benchmarks.prediction --calibrate   # fits the three numbers that no data sheet has

Three rows are used to calibrate (`"calibrates"` in published.json), one for each number; the scores leave them out.
"""

import math
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from scipy.optimize import brentq
from scipy.stats import spearmanr

from benchmarks.figures import table, write_json
from parallel.scale.cluster import Cluster
from parallel.scale.predict import Prediction, predict
from parallel.scale.strategy import Strategy
from parallel.scale.transformer import Transformer

_ROWS = Path(__file__).with_name("published.json")
_TOLERANCE = 0.02
"""A calibrated number that is further than this from what a fit gives is out of date."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A published measurement. `measure` names what it is: see `_measured`."""

    name: str
    source: str
    hardware: str
    model: Transformer
    strategy: Strategy
    measure: str
    published: float
    calibrates: str = ""


def _measured(row: Row, prediction: Prediction) -> float:
    """The prediction of what was published."""
    model = row.model
    if row.measure == "causal_tflops":  # of attention, the half that a causal mask leaves
        masked = 6.0 * model.layers * model.seq**2 * model.queries
        return prediction.model_flops / 1e12 * (1 - masked / model.flops)
    return {
        "hardware_tflops": prediction.hardware_flops / 1e12,
        "model_tflops": prediction.model_flops / 1e12,
        "seconds": prediction.time,
        "tokens": prediction.tokens,
    }[row.measure]


def _utilization(row: Row, value: float) -> float:
    """What was published or predicted, as model FLOP/s of a device: comparable between rows of all measures."""
    if row.measure == "seconds":
        return row.model.flops * row.strategy.batch / (value * row.strategy.devices) / 1e12
    return value * row.model.flops / row.model.seq / 1e12 if row.measure == "tokens" else value


def _calibrate(rows: list[Row]) -> list[list[str]]:
    """Fit each calibrated number to its row; say what it is in the cluster's file, and what it would be."""
    found = []
    for row in rows:
        if not row.calibrates:
            continue
        cluster = Cluster.load(row.hardware)

        def off(value: float, row: Row = row, cluster: Cluster = cluster) -> float:
            changed = msgspec.structs.replace(cluster, **{row.calibrates: value})
            return _measured(row, predict(row.model, row.strategy, changed)) - row.published

        fitted = brentq(off, 0.1, 1.0, xtol=1e-4)
        found.append([f"{row.hardware}: {row.calibrates}", f"{getattr(cluster, row.calibrates):.3f}", f"{fitted:.3f}"])
    return found


def _score(title: str, rows: list[tuple[Row, float]]) -> dict[str, Any]:
    errors = [abs(_utilization(row, got) / _utilization(row, row.published) - 1) for row, got in rows]
    published = [_utilization(row, row.published) for row, _ in rows]
    predicted = [_utilization(row, got) for row, got in rows]
    ranks = float(spearmanr(published, predicted).statistic) if len(rows) > 2 else math.nan
    return {"rows": title, "count": len(rows), "error": float(np.mean(errors)), "worst": max(errors), "rank": ranks}


@click.command()
@click.option("--calibrate", is_flag=True, help="Fit the calibrated numbers; exit 1 if the files are out of date.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(calibrate: bool, json_file: Path | None) -> None:
    rows = msgspec.json.decode(_ROWS.read_bytes(), type=list[Row])
    if calibrate:
        fits = _calibrate(rows)
        print(table(["number", "in use", "fitted"], fits))
        sys.exit(int(any(abs(float(used) / float(fitted) - 1) > _TOLERANCE for _, used, fitted in fits)))
    results = [(row, _measured(row, predict(row.model, row.strategy, Cluster.load(row.hardware)))) for row in rows]
    for source in dict.fromkeys(row.source for row in rows):
        print(f"\n{source}")
        lines = []
        for row, got in results:
            if row.source == source:
                ratio = _utilization(row, got) / _utilization(row, row.published)
                mark = " *" if row.calibrates else ""
                lines.append([row.name + mark, row.measure, f"{row.published:.4g}", f"{got:.4g}", f"{ratio - 1:+.1%}"])
        print(table(["row", "measure", "published", "predicted", "speed"], lines))
    judged = [(row, got) for row, got in results if not row.calibrates]
    scores = [_score("all", judged)]
    for name in dict.fromkeys(row.hardware for row, _ in judged):
        scores.append(_score(name, [pair for pair in judged if pair[0].hardware == name]))
    for source in dict.fromkeys(row.source for row, _ in judged):
        scores.append(_score(source.split(" (")[0], [pair for pair in judged if pair[0].source == source]))
    print("\n* calibrates; left out of the scores. Rank: Spearman's, of model FLOP/s a device.")
    columns = [[s["rows"], s["count"], f"{s['error']:.1%}", f"{s['worst']:.1%}", f"{s['rank']:.2f}"] for s in scores]
    print(table(["rows", "count", "mean error", "worst", "rank"], columns))
    write_json(json_file, {"scores": scores})


if __name__ == "__main__":
    main()
