"""`ringhold plan --config`: the best ways to divide a training step among the devices of a cluster, on paper."""

import json
from typing import Any

from collectives.errors import UsageError
from launch import units
from launch.display import print_table
from launch.scale_options import model_of
from parallel.scale.cluster import Cluster
from parallel.scale.search import Found, search

_TOKENS = 4_000_000
"""Of a step, about, if no batch is given."""


def run(config: str, given: dict[str, Any]) -> None:
    """Search and print.

    Raises:
        UsageError: there is no such model or cluster, or nothing divides it among so many devices.
        DoesNotFit: no division keeps within the memory.

    """
    if given["devices"] is None:
        raise UsageError("--config plans for a cluster: say how many --devices it has")
    model, cluster = model_of(config, given), Cluster.load(given["hardware"])
    devices = given["devices"]
    batch = given["batch"] or max(1, _TOKENS // model.seq // devices) * devices
    memory = given["memory"]
    found = search(model, cluster, devices, batch, given["top"] or 10, memory=memory)
    if given["as_json"]:
        print(json.dumps(_report(found, devices, batch)))
        return
    print(f"{model.name or config}, batch {batch} of {model.seq} tokens, on {devices} devices: {cluster.name}")
    print(f"{found.tried} strategies, {found.pruned} of them too large for {(memory or cluster.memory) / 1e9:.4g} GB\n")
    _show(found)


def _show(found: Found) -> None:
    rows = []
    for number, candidate in enumerate(found.best):
        prediction = candidate.prediction
        why = candidate.why(found.best[number - 1]) if number else "the best"
        rows.append(
            (
                str(candidate.strategy),
                units.duration(prediction.time),
                f"{prediction.model_flops / 1e12:.0f}",
                f"{prediction.memory.total / 1e9:.0f} GB",
                why,
            )
        )
    print_table(("division", "step", "TFLOP/s", "memory", "slower than the one above by"), rows)


def _report(found: Found, devices: int, batch: int) -> dict[str, Any]:
    plans = []
    for number, candidate in enumerate(found.best):
        strategy = candidate.strategy
        names = ("dp", "tp", "pp", "cp", "ep", "microbatch", "interleave", "recompute", "zero", "precision")
        plans.append(
            {name: getattr(strategy, name) for name in names}
            | candidate.prediction.to_json()
            | {"loses_to_the_one_before_by": candidate.why(found.best[number - 1]) if number else ""}
        )
    return {"devices": devices, "batch": batch, "tried": found.tried, "pruned": found.pruned, "plans": plans}
