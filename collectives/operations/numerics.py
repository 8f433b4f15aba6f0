"""Which all-reduce a caller's keywords ask for; `collectives.calls` asks here."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from collectives.error_feedback import Residual
from collectives.errors import UsageError
from collectives.operations.quantized import Quantized
from collectives.operations.reductions import AllReduce
from collectives.operations.reproducible import Reproducible


def all_reduce(
    *,
    codec: str | None = None,
    rounding: str | None = None,
    feedback: Residual | None = None,
    reproducible: bool = False,
    contributions: Sequence[Tensor] | None = None,
    **given: Any,
) -> AllReduce:
    """Make a plain, `Quantized` or `Reproducible` all-reduce; `given` is what these share.

    Raises:
        UsageError: the keywords contradict each other, or what they are given does not fit.

    """
    if codec is not None and reproducible:
        raise UsageError("all_reduce: a codec rounds, so the sum cannot be reproducible; give one of the two")
    if codec is None and (rounding is not None or feedback is not None):
        raise UsageError("all_reduce: rounding and feedback belong to a codec; name one")
    if contributions is not None and not reproducible:
        raise UsageError("all_reduce: several contributions of one member need reproducible=True; else add them up")
    if codec is not None:
        return Quantized(codec=codec, rounding=rounding or "nearest", feedback=feedback, **given)
    if reproducible:
        return Reproducible(contributions=contributions, **given)
    return AllReduce(**given)
