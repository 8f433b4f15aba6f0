"""All-to-all, of equal blocks and of uneven ones, and any schedule of the caller's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from collectives.errors import UsageError
from collectives.instructions import Kernel
from collectives.operations.base import Operation, Plan, View
from collectives.operations.tensors import check_rows, flat, handed_over, row_size
from collectives.reduction import ReduceOp
from collectives.schedule import Schedule
from collectives.staging import copy_out


@dataclass(slots=True, kw_only=True)
class AllToAll(Operation):
    """Rank d ends with block d of each member's tensor, in rank order; blocks are equal parts along dim 0."""

    kind: ClassVar[str] = "all_to_all"
    collective: ClassVar[str] = "all_to_all"
    shrinks: ClassVar[bool] = False

    def count(self, view: View) -> int:
        """A block from each to each."""
        return view.size * self.tensor.numel()

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Hand over the staging, in the shape of the input."""
        return handed_over(pieces, self.tensor.dtype).view(self.tensor.shape)

    def _check(self) -> None:
        check_rows(self.kind, self.tensor, self.view.size)


@dataclass(slots=True, kw_only=True)
class AllToAllRows(AllToAll):
    """The same with `rows[s][d]` rows from rank s to rank d, which all members know to be so."""

    kind: ClassVar[str] = "all_to_all_v"
    rows: Sequence[Sequence[int]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return tuple(self.tensor.shape[1:])

    def count(self, view: View) -> int:
        """All rows."""
        return sum(map(sum, self.rows)) * row_size(self.tensor)

    def counts(self, view: View) -> tuple[int, ...]:
        """In elements."""
        return tuple(rows * row_size(self.tensor) for rows in chain.from_iterable(self.rows))

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Hand over the staging as (rows received, ...)."""
        total = sum(row[view.rank] for row in self.rows)
        return handed_over(pieces, self.tensor.dtype).view(total, *self.tensor.shape[1:])

    def _check(self) -> None:
        """What the rows are was found together."""


@dataclass(slots=True, kw_only=True)
class Exchange(Operation):
    """Runs a given schedule on the caller's flat buffer, in place."""

    kind: ClassVar[str] = "exchange"
    collective: ClassVar[str] = "all_reduce"
    shrinks: ClassVar[bool] = False
    given: Schedule
    kernels: Mapping[str, Kernel]

    @property
    def writes(self) -> Sequence[Tensor]:
        """The buffer."""
        return (self.tensor,)

    def label(self, view: View) -> str:
        """Name and length of the schedule."""
        return f"{self.given.kind}/{self.given.algorithm}/{len(self.given)}"

    def schedule(self, view: View) -> Schedule:
        """The schedule as given."""
        return self.given

    def source(self, view: View) -> Tensor:
        """The held ranges."""
        whole = self.input.as_strided((self.input.numel(),), (1,))
        held = self.given.held(view.rank)
        if held == ((0, whole.numel()),):
            return whole
        return torch.cat([*(whole[start:stop] for start, stop in held), whole[:0]])

    def plan(self, view: View) -> Plan:
        """With the caller's op and kernels."""
        return Plan(self.given, self.source(view), self.tensor.dtype, ReduceOp(self.op), self.kernels)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Copy the wanted ranges into the buffer."""
        buffer, left = self.tensor.detach(), list(reversed(pieces))
        for start, stop in self.given.wanted(view.rank):
            while start < stop:
                piece = left.pop()
                size = min(stop - start, piece.numel())
                copy_out(piece[:size], buffer[start : start + size])
                start += size  # noqa: PLW2901 - what is left of the range
                if size < piece.numel():
                    left.append(piece[size:])
        return self.tensor

    def _check(self) -> None:
        if self.tensor.dim() != 1 or self.tensor.numel() != self.given.count or not self.tensor.is_contiguous():
            shape, count = list(self.tensor.shape), self.given.count
            raise UsageError(f"run: the schedule needs a flat contiguous buffer of {count} elements, not shape {shape}")
        if self.given.world != self.view.size:
            raise UsageError(f"run: a schedule for a world of {self.given.world}, but there are {self.view.size}")


@dataclass(slots=True, kw_only=True)
class Redistribute(Exchange):
    """Runs a given schedule on the ranges that this rank holds, and gives those that it wants as a new tensor."""

    kind: ClassVar[str] = "redistribute"

    @property
    def writes(self) -> Sequence[Tensor]:
        """Nothing of the caller's."""
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the work buffer: ranks hold and want different parts of it."""
        return (self.given.count,)

    def source(self, view: View) -> Tensor:
        """The held ranges, one behind the other."""
        return flat(self.input)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Hand over the staging."""
        return handed_over(pieces, self.tensor.dtype)

    def _check(self) -> None:
        rank, size = self.view.rank, self.view.size
        if self.given.world != size:
            raise UsageError(f"redistribute: a schedule for a world of {self.given.world}, but there are {size}")
        held = sum(stop - start for start, stop in self.given.held(rank))
        if self.tensor.numel() != held:
            raise UsageError(f"redistribute: rank {rank} holds {held} elements, not {self.tensor.numel()}")
