"""The same training by one process that nothing happens to, and the comparison of a run's losses with it.

Called by the training command and the demo. The comparison is only worth something if it can fail, so `control` feeds
it a run with an error of the kind that a wrong recovery makes, and the caller expects it to be refused.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.region import split
from collectives.state import state_hash
from launch import checkpoints, data, gradient
from launch.config import DType, JobConfig
from launch.trainer import Trainer, one_thread

TOLERANCES: dict[DType, float] = {"fp32": 1e-5, "fp64": 1e-12}
"""Largest difference of a step's loss that rounding may make, by the model's dtype."""
CONTROL_STEPS = 8
"""Steps of `control`."""
_MOST_CONTROL_MEMBERS = 4
"""Among more members one wrong share is a smaller error, in the end too small for so few steps to show."""

OnStep = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Reference:
    """A fault-free run."""

    first_step: int
    """0, or the step that it was resumed from."""
    losses: tuple[float, ...]
    """Of each step from the first on."""
    seconds: float
    hash: str
    """Of the state at the end."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a run's losses are from the reference's. `str()` of it is one line."""

    steps: int
    worst: float
    """Largest absolute difference; infinite where a loss is missing or not finite."""
    worst_step: int
    """Where that was. Steps count from the first loss that is compared."""
    first_bad_step: int | None
    """First step whose difference exceeds the tolerance."""
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether all differences are within the tolerance."""
        return self.first_bad_step is None

    def __str__(self) -> str:
        if self.ok:
            return f"{self.steps} losses within {self.worst:.1e} of the reference ({self.tolerance:.0e} allowed)"
        return (
            f"from step {self.first_bad_step} on losses differ from the reference, by {self.worst:.1e} at step "
            f"{self.worst_step} ({self.tolerance:.0e} allowed)"
        )


def run(config: JobConfig, on_step: OnStep | None = None) -> Reference:
    """Train as `config` says, alone and from start to end; write nothing.

    Args:
        config: with `resume`, the reference starts from the same state.
        on_step: called after each step with the number of steps done and the loss.

    Raises:
        UsageError, CorruptFile: the text or the state to resume from do not fit.

    """
    comm = Communicator.solo()

    def accumulate(trainer: Trainer, samples: Sequence[int]) -> float:
        outcome = gradient.reduce(trainer, comm, samples)
        assert outcome.result is not None
        return float(outcome.result[0])

    return _run(config, config.steps, accumulate, on_step)


def control(config: JobConfig, reference: Reference, members: int = 4, steps: int = CONTROL_STEPS) -> Comparison:
    """Compare the reference with the first `steps` steps of a run that counts one member's share wrongly.

    From its second step on, the gradients of the last of `members` members are divided as if one member less took part,
    which is what an average over the wrong number of contributors does. The loss that is compared is itself computed
    right, so that only the wrong updates can give the error away. Expect `ok` to be False.

    Raises:
        UsageError: fewer than two members have samples, or the run is too short for an error to show.

    """
    working = min(members, config.batch, _MOST_CONTROL_MEMBERS)
    steps = min(steps, len(reference.losses))
    if working < 2 or steps < 3:
        raise UsageError(f"a control needs 2 members with samples and 3 steps, not {working} and {steps}")

    def accumulate(trainer: Trainer, samples: Sequence[int]) -> float:
        last, _ = split(len(samples), working)[-1]
        wrong = trainer.step > reference.first_step
        divisor = trainer.tokens * (working - 1) // working if wrong else trainer.tokens
        return trainer.accumulate(samples[:last], trainer.tokens) + trainer.accumulate(samples[last:], divisor)

    found = _run(config, reference.first_step + steps, accumulate, None)
    return compare(found.losses, reference.losses[:steps], config.dtype)


def compare(losses: Sequence[float], reference: Sequence[float], dtype: DType) -> Comparison:
    """Compare losses step by step; a step that only one of the two has counts as infinitely wrong."""
    tolerance = TOLERANCES[dtype]
    steps = max(len(losses), len(reference))
    differences = [math.inf] * steps
    for step, (loss, expected) in enumerate(zip(losses, reference, strict=False)):
        if math.isfinite(loss) and math.isfinite(expected):
            differences[step] = abs(loss - expected)
    worst = max(differences, default=math.inf)
    return Comparison(
        steps=steps,
        worst=worst,
        worst_step=differences.index(worst) if differences else 0,
        first_bad_step=next(
            (step for step, value in enumerate(differences) if value > tolerance), None if steps else 0
        ),
        tolerance=tolerance,
    )


def _run(
    config: JobConfig, stop: int, accumulate: Callable[[Trainer, Sequence[int]], float], on_step: OnStep | None
) -> Reference:
    started = time.perf_counter()
    losses: list[float] = []
    with one_thread():
        trainer = Trainer(config, data.load(config.data, config.context, config.batch))
        if config.resume is not None:
            trainer.absorb(checkpoints.load(config.resume))
        first = trainer.step
        while trainer.step < stop:
            trainer.clear()
            losses.append(accumulate(trainer, trainer.plan.samples(trainer.step)) / trainer.tokens)
            trainer.apply()
            if on_step is not None:
                on_step(trainer.step, losses[-1])
    return Reference(first, tuple(losses), time.perf_counter() - started, state_hash(trainer.state()))
