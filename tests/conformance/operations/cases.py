"""What the functions of this folder share: shapes, layouts, and the check of an outcome."""

from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.outcome import Outcome
from tests.conformance.values import DTYPES, OPS, exact
from tests.harness.peer import bits

SHAPES: list[list[int]] = [[], [0], [3, 0], [1], [2], [3], [7, 5], [33, 2, 3], [1023]]
LAYOUTS = ("contiguous", "strided", "transposed", "leaf")
UNREDUCED = (*DTYPES, "bool", "complex64")
"""Dtypes that can be moved, if not all of them be reduced."""


def ops_of(dtype: torch.dtype) -> tuple[str, ...]:
    """The reduce ops of a dtype: there is no avg of integers."""
    return OPS if dtype.is_floating_point else tuple(op for op in OPS if op != "avg")


def contributions(comm: Communicator, shape: list[int], dtype: torch.dtype, op: str, seed: int) -> list[Tensor]:
    """Exact inputs of all members, by rank."""
    return [exact(rank, shape, dtype, op, seed) for rank in range(comm.size)]


def moved(comm: Communicator, shape: list[int], name: str, seed: int) -> list[Tensor]:
    """Inputs of any dtype of all members, by rank."""
    return [exact(rank, shape, torch.int16, "sum", seed).to(getattr(torch, name)) for rank in range(comm.size)]


def check(comm: Communicator, outcome: Outcome, expected: Tensor, case: Any) -> str:
    """A healthy group's outcome with these bits; returns their digest."""
    result = outcome.result
    assert result is not None, case
    assert result.dtype == expected.dtype, case
    assert result.shape == expected.shape, (case, result.shape)
    assert torch.equal(result, expected), (case, result, expected)
    assert outcome == Outcome(result, comm.members, comm.epoch, 1, False), (case, outcome)
    return bits(result)


def check_nothing(comm: Communicator, outcome: Outcome, case: Any) -> None:
    """A healthy group's outcome at a member that has no result."""
    assert outcome == Outcome(None, comm.members, comm.epoch, 1, False), (case, outcome)
