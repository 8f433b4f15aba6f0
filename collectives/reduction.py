"""The reduce operations, by name; used by the engine and the communicator."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class ReduceOp(StrEnum):
    """An associative, commutative operation on elements. An average is a SUM with a "finish" that divides."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"
    PROD = "prod"


_FUNCTIONS: dict[ReduceOp, Callable[..., Any]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PROD: torch.mul,
}


def function(op: ReduceOp) -> Callable[[Tensor, Tensor, Tensor], object]:
    """Return `reduce(first, second, out)`, elementwise; `out` may be one of the operands, or of a wider dtype."""
    torch_function = _FUNCTIONS[op]
    return lambda first, second, out: torch_function(first, second, out=out)
