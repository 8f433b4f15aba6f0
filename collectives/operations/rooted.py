"""Broadcast, scatter and barrier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from collectives.errors import UsageError
from collectives.operations.base import Operation, View
from collectives.operations.tensors import check_tensor, flat, write


@dataclass(slots=True, kw_only=True)
class Broadcast(Operation):
    """Every member ends with the root's tensor, in place."""

    kind: ClassVar[str] = "broadcast"
    collective: ClassVar[str] = "broadcast"
    lift: ClassVar[bool] = False

    @property
    def writes(self) -> Sequence[Tensor]:
        """The tensor, but for the root's."""
        return () if self.view.members[self.view.rank] == self.root else (self.tensor,)

    def source(self, view: View) -> Tensor:
        """Nothing, but for the root."""
        return flat(self.input)[: None if view.members[view.rank] == self.root else 0]

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Copy to the caller's tensor, but for the root, which has it."""
        return self.tensor if view.members[view.rank] == self.root else write(pieces, self.tensor)


@dataclass(slots=True, kw_only=True)
class Scatter(Operation):
    """Rank r ends with row r of the root's `rows`, of shape (size, *shape), in its `tensor`."""

    kind: ClassVar[str] = "scatter"
    collective: ClassVar[str] = "scatter"
    shrinks: ClassVar[bool] = False
    lift: ClassVar[bool] = False
    rows: Tensor | None = None

    @property
    def reads(self) -> Sequence[Tensor]:
        """The root's rows."""
        return () if self.rows is None or self.snapshot else (self.rows,)

    @property
    def writes(self) -> Sequence[Tensor]:
        """The tensor."""
        return (self.tensor,)

    def count(self, view: View) -> int:
        """All rows."""
        return view.size * self.tensor.numel()

    def source(self, view: View) -> Tensor:
        """The rows at the root, nothing elsewhere."""
        return flat(self.input)[: None if self.rows is not None else 0]

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Copy the row to the caller's tensor."""
        return write(pieces, self.tensor)

    def _check(self) -> None:
        is_root = self.view.members[self.view.rank] == self.root
        if is_root != (self.rows is not None):
            raise UsageError(f"scatter: the root {self.root}, and no other member, gives the rows to be scattered")
        if self.rows is None:
            return
        check_tensor(self.kind, self.rows)
        shape = (self.view.size, *self.tensor.shape)
        if tuple(self.rows.shape) != shape or self.rows.dtype != self.tensor.dtype:
            given = f"{list(self.rows.shape)} {self.rows.dtype}"
            raise UsageError(f"scatter: the rows are {given}, they must be {list(shape)} {self.tensor.dtype}")
        self.input = self.rows.detach().clone() if self.snapshot else self.rows.detach()


@dataclass(slots=True, kw_only=True)
class Barrier(Operation):
    """Nobody returns before everybody entered: a broadcast of nothing, and the confirmation behind it."""

    kind: ClassVar[str] = "barrier"
    collective: ClassVar[str] = "broadcast"

    def deliver(self, pieces: Sequence[Tensor], view: View) -> None:
        """Return nothing."""
