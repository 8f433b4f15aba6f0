"""All-gather and gather, of equal rows and of rows of uneven length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from collectives.operations.base import Operation, View
from collectives.operations.tensors import brief, check_out, handed_over, row_size, write


@dataclass(slots=True, kw_only=True)
class Gathering(Operation):
    """What the gathers of one equal tensor from each member share."""

    def count(self, view: View) -> int:
        """A row from each."""
        return view.size * self.tensor.numel()

    def stacked(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """The result as a new tensor of shape (contributors, *shape)."""
        return handed_over(pieces, self.tensor.dtype).view(view.size, *self.tensor.shape)


@dataclass(slots=True, kw_only=True)
class AllGather(Gathering):
    """Every member ends with the contributions of all, a row each, in rank order."""

    kind: ClassVar[str] = "all_gather"
    collective: ClassVar[str] = "all_gather"
    out: Tensor | None = None

    @property
    def elastic(self) -> bool:
        """Unless a preallocated output fixes the number of rows (rule R6)."""
        return self.on_loss == "retry" and self.out is None

    @property
    def writes(self) -> Sequence[Tensor]:
        """The preallocated output."""
        return () if self.out is None else (self.out,)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Hand over the staging, or copy it to `out`."""
        return self.stacked(pieces, view) if self.out is None else write(pieces, self.out)

    def _check(self) -> None:
        if self.out is not None:
            check_out(self.kind, self.out, (self.view.size, *self.tensor.shape), self.tensor.dtype)


@dataclass(slots=True, kw_only=True)
class Gather(Gathering):
    """The root ends with the contributions of all, a row each, in rank order; the others with nothing."""

    kind: ClassVar[str] = "gather"
    collective: ClassVar[str] = "gather"

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor | None:
        """Hand over the root's staging."""
        return self.stacked(pieces, view) if view.members[view.rank] == self.root else None


@dataclass(slots=True, kw_only=True)
class GatherRows(Operation):
    """Every member ends with the rows of all, in rank order; `rows` says how many each member has, by id.

    By id, because a member may be lost after the numbers became known.
    """

    kind: ClassVar[str] = "all_gather_v"
    collective: ClassVar[str] = "all_gather"
    rows: Mapping[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return tuple(self.tensor.shape[1:])

    def label(self, view: View) -> str:
        """The counts must be equal, too."""
        counts = [self.rows[member] for member in view.members]
        return f"{Operation.label(self, view)}, counts {brief(str(counts))}"

    def count(self, view: View) -> int:
        """All rows."""
        return sum(self.counts(view))

    def counts(self, view: View) -> tuple[int, ...]:
        """In elements."""
        return tuple(self.rows[member] * row_size(self.tensor) for member in view.members)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Hand over the staging as (rows of all, ...)."""
        total = sum(self.rows[member] for member in view.members)
        return handed_over(pieces, self.tensor.dtype).view(total, *self.tensor.shape[1:])
