"""What quantized and reproducible all-reduces refuse, before anything is sent."""

from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.algorithms.encoded import pieces
from collectives.communicator import Communicator
from collectives.error_feedback import ErrorFeedback
from collectives.errors import UnsupportedTensor, UsageError
from collectives.operations import View
from collectives.operations.reproducible import Reproducible
from collectives.reproducible import MOST

ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("tensor", "how", "told"),
    [
        (ONES, {"codec": "fp4"}, "codec must be one of int8, int4, bf16, not 'fp4'"),
        (ONES, {"codec": "int8", "rounding": "up"}, "rounding must be one of nearest, stochastic, not 'up'"),
        (ONES, {"codec": "int8", "reproducible": True}, "give one of the two"),
        (ONES, {"rounding": "nearest"}, "belong to a codec"),
        (ONES, {"feedback": ErrorFeedback().of("w")}, "belong to a codec"),
        (ONES, {"contributions": [ONES]}, "need reproducible=True"),
        (ONES, {"codec": "int8", "op": "max"}, "op must be sum or avg, not 'max'"),
        (ONES, {"reproducible": True, "op": "prod"}, "op must be sum or avg, not 'prod'"),
        (ONES, {"reproducible": True, "algorithm": "ring"}, "unknown algorithm 'ring'; there are auto, encoded"),
        (ONES, {"reproducible": True, "contributions": [torch.ones(5)]}, "they have to be alike"),
        (ONES, {"reproducible": True, "contributions": [ONES.double()]}, "they have to be alike"),
        (ONES, {"codec": "int8", "out": torch.ones(5)}, "out is [5]"),
    ],
)
def test_calls_that_make_no_sense_are_refused_by_name(tensor: Tensor, how: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Communicator.solo().all_reduce(tensor, **how)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float64, {"codec": "int8"}),
        (torch.int32, {"codec": "int8"}),
        (torch.int64, {"reproducible": True}),
    ],
)
def test_dtypes_that_they_cannot_take_are_refused(dtype: torch.dtype, how: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedTensor, match="it takes float32"):
        Communicator.solo().all_reduce(torch.ones(4, dtype=dtype), **how)


def test_too_many_contributions_are_refused_on_every_member_alike() -> None:
    view, tensor = View(1, (1,), 0), torch.ones(8)
    operation = Reproducible(tensor=tensor, lane="main", view=view, op="sum", contributions=[ONES.repeat(2)])
    made = operation.combine(pieces(1, 1, 8)[0], operation.plan(view).source.view(1, 1, -1), view)
    made.view(torch.int64)[0, 0] = MOST
    operation.deliver([made.view(-1)], view)
    assert torch.equal(tensor, torch.ones(8))
    made.view(torch.int64)[0, 0] = MOST + 1
    with pytest.raises(UsageError, match="65537 contributions"):
        operation.deliver([made.view(-1)], view)
