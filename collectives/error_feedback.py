"""Error feedback: what a quantized all-reduce leaves out of a sum is added to the next one of the same tensor.

    feedback = ErrorFeedback()
    comm.all_reduce(gradient, "avg", codec="int4", feedback=feedback.of("layer1"))

A member keeps for each name one residual of the tensor's shape, fp32: what rounding has so far taken from its own
contributions, and from the sums that it combined. It is part of the next contribution, so over many operations the
sums add up to what they would be without rounding, off by the residuals of now (Seide et al., "1-Bit Stochastic
Gradient Descent", Interspeech 2014; both directions as in Tang et al., "DoubleSqueeze", ICML 2019). What a lost member
still owed is lost with it.

A residual changes only when its operation completes (rule R8). An operation that fails leaves it alone, and one that is
run again after a loss begins with the same residual. For a training step that is repeated although some of its
operations were complete, take `state()` before the step and `restore` it.
"""

from collections.abc import Mapping

from torch import Tensor


class ErrorFeedback:
    """The residuals of one member, by name. Each name is used on one lane."""

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}

    def of(self, name: str) -> "Residual":
        """Return the residual of a tensor, as the argument `feedback` of its all-reduces."""
        return Residual(self, name)

    def get(self, name: str) -> Tensor | None:
        """Return the residual of that name; None where nothing was ever left out. Not to be written."""
        return self._residuals.get(name)

    def put(self, name: str, residual: Tensor) -> None:
        """Put a new residual in the place of the one of that name."""
        self._residuals[name] = residual

    def state(self) -> dict[str, Tensor]:
        """Return all residuals, flat fp32 tensors by name. None is ever written: a new one takes its place."""
        return dict(self._residuals)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` returned."""
        self._residuals = dict(state)


class Residual:
    """The residual of one tensor."""

    def __init__(self, feedback: ErrorFeedback, name: str) -> None:
        self.name = name
        self._feedback = feedback

    def get(self) -> Tensor | None:
        """Return what is left, flat fp32, if anything ever was."""
        return self._feedback.get(self.name)

    def commit(self, residual: Tensor) -> None:
        """Put a new residual in its place; for the operation, once it is complete."""
        self._feedback.put(self.name, residual)
