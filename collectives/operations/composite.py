"""Calls of several operations in a row on one lane, such as one that must first learn how much each member brings.

Each operation is complete on every member before the next one begins, and what a call decides in between follows from
what all members have learned. So a loss ends or repeats the same operation on all survivors, and a call that finds its
arguments contradictory does so on all members alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from collectives.operations.base import Call, Operation
from collectives.operations.gathers import AllGather
from collectives.operations.tensors import brief
from collectives.outcome import Outcome

Execute = Callable[[Operation], Outcome]


@dataclass(slots=True, kw_only=True)
class Composite(Call):
    """A call of several operations."""

    def how(self) -> dict[str, Any]:
        """Keywords that its operations share. A snapshot is the call's own matter: it is taken when that is issued."""
        return {"lane": self.lane, "on_loss": self.on_loss, "view": self.view, "algorithm": self.algorithm}

    def learn(self, execute: Execute, numbers: list[int], elastic: bool) -> tuple[dict[int, list[int]], Outcome]:
        """Tell every member some numbers and hear theirs, by member id.

        Args:
            execute: see `Call.run`.
            numbers: as many on every member.
            elastic: go on without a member that is lost; else that is `MemberLost`.

        """
        kind = Numbers if elastic else FixedNumbers
        tensor = torch.tensor(numbers, dtype=torch.int64)
        outcome = execute(kind(purpose=self.kind, tensor=tensor, lane=self.lane, on_loss=self.on_loss, view=self.view))
        assert outcome.result is not None, "an all-gather has a result"
        return dict(zip(outcome.contributors, outcome.result.tolist(), strict=True)), outcome


@dataclass(slots=True, kw_only=True)
class Numbers(AllGather):
    """The numbers that the members tell each other at the beginning of a call; `purpose` is its kind."""

    kind: ClassVar[str] = "numbers"
    purpose: str

    def label(self, view: object) -> str:
        """They tell each other numbers of the same call."""
        return f"for {self.purpose}"


@dataclass(slots=True, kw_only=True)
class FixedNumbers(Numbers):
    """The same, for a call that is about these members and no others."""

    shrinks: ClassVar[bool] = False

    @property
    def elastic(self) -> bool:
        """Never."""
        return False


def as_one(outcomes: list[Outcome], **changes: Any) -> Outcome:
    """The outcome of a call from those of its operations: the last one's, but with all attempts counted."""
    attempts = 1 + sum(outcome.attempts - 1 for outcome in outcomes)
    from_staging = any(outcome.from_staging for outcome in outcomes)
    return replace(outcomes[-1], attempts=attempts, from_staging=from_staging, **changes)


def summary(tensors: Sequence[Tensor]) -> str:
    """Dtypes and shapes of some tensors, for a header."""
    return brief(", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors))
