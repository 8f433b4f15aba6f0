"""From measured all-reduces to the numbers of the cost model (`collectives.cost.Profile`): alpha, beta, gamma and co.

Called on rank 0 of `ringhold bench --calibrate`, with the times of every algorithm at every size; what a rank computes
is fitted in the same way by `launch.bench_roofline`. The fit is least
squares over the logarithms of estimate / measured, by Gauss-Newton with damping (Levenberg 1944, Marquardt 1963). The
profile that the transport had before is a weak prior: it decides what the measurements leave open, such as how a
message's time is shared between its latency and the work at its ends.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from collectives import choice
from collectives.cost import Profile, estimate, profile_of
from collectives.errors import UsageError
from collectives.schedule import Schedule

KIND, ITEM = "all_reduce", 4
PRIOR = 0.1
"""Weight of the prior: to be off by a factor of e counts as an error of a tenth in one measurement."""
_ROUNDS = 30
_STEP = 1e-3
_SETTLED = 1e-4
"""A round that gains less of the sum of squares is the last."""

Times = Mapping[str, Mapping[int, float]]
"""Seconds by algorithm and size in bytes."""
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fit:
    """A profile and how well it tells what was measured.

    Attributes:
        error: root mean square of ln(estimate / measured).
        worst: the worst case, as (ln(estimate / measured), algorithm, size).
        loss: at each size, the time of the algorithm that the estimate finds best over that of the fastest; the mean.

    """

    profile: Profile
    error: float
    worst: tuple[float, str, int]
    loss: float


def algorithms(world: int) -> tuple[str, ...]:
    """Return the names of those that make sense in a world of this size on one host."""
    able = []
    for name in choice.names(KIND):
        try:
            choice.build(KIND, name, world, 1024)
        except UsageError:
            continue  # not for this number of ranks
        if "hosts" not in choice.takes(KIND, name):
            able.append(name)
    return tuple(able)


def fit(transport: str, world: int, times: Times) -> Fit:
    """Fit a profile to the times of all-reduces of floats among `world` ranks of one host."""
    start = profile_of(transport)
    cases = [(name, size) for name, of_name in times.items() for size in of_name]
    schedules = [choice.build(KIND, name, world, size // ITEM) for name, size in cases]
    measured = np.log([times[name][size] for name, size in cases])
    prior = _parameters(start)

    def residuals(parameters: Vector) -> Vector:
        errors = _estimates(schedules, _profile(start, parameters)) - measured
        return np.concatenate([errors, PRIOR * (parameters - prior)])

    best = least_squares(residuals, prior)
    profile = _profile(start, best)
    errors = residuals(best)[: len(cases)]
    worst = int(np.abs(errors).argmax())
    root_mean_square = float(np.sqrt((errors**2).mean()))
    loss = _loss(cases, measured + errors, measured)
    return Fit(profile, root_mean_square, (float(errors[worst]), *cases[worst]), loss)


def _estimates(schedules: Sequence[Schedule], profile: Profile) -> Vector:
    return np.log([estimate(schedule, profile, ITEM) for schedule in schedules])


def _parameters(profile: Profile) -> Vector:
    """The logarithms of what is fitted: all are positive, and may be wrong by factors."""
    near = profile.near
    return np.log([near.latency, near.bandwidth, profile.overhead, profile.reduce_rate, max(profile.operation, 1e-6)])


def _profile(like: Profile, parameters: Vector) -> Profile:
    latency, bandwidth, overhead, reduce_rate, operation = (float(f"{number:.4g}") for number in np.exp(parameters))
    near = msgspec.structs.replace(like.near, latency=latency, bandwidth=bandwidth)
    return msgspec.structs.replace(like, near=near, overhead=overhead, reduce_rate=reduce_rate, operation=operation)


def least_squares(residuals: Callable[[Vector], Vector], start: Vector) -> Vector:
    """The parameters with the least sum of squared residuals, from a start near them."""
    best, damping = start, 1.0
    errors = residuals(best)
    for _ in range(_ROUNDS):
        slopes = np.stack([(residuals(best + step) - errors) / _STEP for step in _STEP * np.eye(len(best))], axis=1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.eye(len(best)), -slopes.T @ errors)
        candidate = best + np.clip(step, -1.0, 1.0)
        found = residuals(candidate)
        gain = errors @ errors - found @ found
        if gain > 0:
            best, errors, damping = candidate, found, damping / 3
            if gain < _SETTLED * (found @ found):
                break
        else:
            damping *= 4
    return best


def _loss(cases: Sequence[tuple[str, int]], estimated: Vector, measured: Vector) -> float:
    ratios = []
    for size in {size for _, size in cases}:
        of_size = [index for index, (_, other) in enumerate(cases) if other == size]
        chosen = min(of_size, key=lambda index: float(estimated[index]))
        fastest = min(float(measured[index]) for index in of_size)
        ratios.append(np.exp(measured[chosen] - fastest))
    return float(np.mean(ratios))
