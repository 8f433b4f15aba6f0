"""What a rank computes: FLOP/s of matrix products by dtype, bytes a second of its memory, seconds that any call takes.

`ringhold bench --calibrate` measures it on all ranks at once, because they share cores and memory, as in a job; the
planner goes by it (`parallel.machine`). The model is the roofline (Williams et al., CACM 2009): a call takes `kernel`
seconds, and as long as its FLOPs or its bytes take, whichever is more. Fitted like the cost of messages, by
`bench_calibrate.least_squares`.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from collectives.cost import Compute
from launch.bench_calibrate import PRIOR, Vector, least_squares

PRODUCTS = {"float32": (64, 128, 256, 512), "bfloat16": (64, 128, 256, 512), "float64": (64, 128, 256)}
"""Square matrices by dtype: their rows."""
ADDED = (2**12, 2**16, 2**20, 2**23)
"""Bytes of each of two fp32 tensors that are added."""
_TURNS, _EXTREMES = 9, 2
_BATCH_SECONDS = 2e-3
_LIKELY = Compute(flops=dict.fromkeys(PRODUCTS, 4e10), bandwidth=2e10, kernel=4e-6)

Case = tuple[str, int]
"""A dtype and the rows of a product; or "add" and bytes of a tensor."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """What was found, and the root mean square of ln(model / measured)."""

    compute: Compute
    error: float


def measure() -> dict[Case, float]:
    """Seconds of each case on this rank, with the threads that torch has: means over turns of all of them.

    Means, because ranks that share a core get it in turns, which last longer than most cases; without the extremes.
    """
    calls = dict(_calls())
    for call in calls.values():
        call()
    batches = {case: max(1, int(_BATCH_SECONDS / max(_time(call, 1), 1e-6))) for case, call in calls.items()}
    samples: dict[Case, list[float]] = {case: [] for case in calls}
    for _ in range(_TURNS):
        for case, call in calls.items():
            samples[case].append(_time(call, batches[case]))
    return {case: statistics.fmean(sorted(taken)[_EXTREMES:-_EXTREMES]) for case, taken in samples.items()}


def fit(times: Mapping[Case, float]) -> Roofline:
    """Fit the roofline to seconds by case."""
    measured = np.log(list(times.values()))
    prior = _parameters(_LIKELY)

    def residuals(parameters: Vector) -> Vector:
        model = _compute(parameters)
        errors = np.log([seconds(model, case) for case in times]) - measured
        return np.concatenate([errors, PRIOR * (parameters - prior)])

    best = least_squares(residuals, prior)
    errors = residuals(best)[: len(measured)]
    return Roofline(_compute(best), float(np.sqrt((errors**2).mean())))


def seconds(compute: Compute, case: Case) -> float:
    """What a case takes by the model."""
    kind, size = case
    if kind == "add":
        return compute.kernel + 3 * size / compute.bandwidth
    itemsize: int = getattr(torch, kind).itemsize
    moved = 3 * size * size * itemsize
    return compute.kernel + max(2.0 * size**3 / compute.flops[kind], moved / compute.bandwidth)


def _calls() -> list[tuple[Case, Callable[[], object]]]:
    found: list[tuple[Case, Callable[[], object]]] = []
    for name, sizes in PRODUCTS.items():
        for rows in sizes:
            a, b = (torch.full((rows, rows), 0.5, dtype=getattr(torch, name)) for _ in range(2))
            found.append(((name, rows), lambda a=a, b=b: torch.mm(a, b)))  # type: ignore[misc]
    for size in ADDED:
        a, b = torch.ones(size // 4), torch.ones(size // 4)
        found.append((("add", size), lambda a=a, b=b: torch.add(a, b)))  # type: ignore[misc]
    return found


def _time(call: Callable[[], object], times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def _parameters(compute: Compute) -> Vector:
    """The logarithms of what is fitted."""
    return np.log([compute.kernel, compute.bandwidth, *(compute.flops[name] for name in PRODUCTS)])


def _compute(parameters: Vector) -> Compute:
    kernel, bandwidth, *flops = (float(f"{number:.4g}") for number in np.exp(parameters))
    return Compute(flops=dict(zip(PRODUCTS, flops, strict=True)), bandwidth=bandwidth, kernel=kernel)
