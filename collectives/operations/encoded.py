"""All-reduces of encoded contributions: what `Quantized` and `Reproducible` share, which differ in what a record is.

Each is one schedule (`collectives.algorithms.encoded`), so a loss in the middle repeats all of it among the survivors,
from what was encoded once from untouched inputs: the result never mixes contributors.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from collectives.algorithms import encoded
from collectives.algorithms.encoded import Piece
from collectives.errors import UnsupportedTensor, UsageError
from collectives.operations.base import Plan, View
from collectives.operations.reductions import AllReduce
from collectives.reduction import ReduceOp
from collectives.schedule import Schedule
from collectives.staging import StagingPool, copy_out

_pool = StagingPool()
"""For records and results: of the size of tensors, and not needed for longer than an operation."""


@dataclass(slots=True, kw_only=True)
class Encoded(AllReduce):
    """The schedule, and the way from records to the caller's tensor."""

    dtypes: ClassVar[tuple[torch.dtype, ...]]
    ops: ClassVar[tuple[str, ...]] = ("sum", "avg")
    block: int = field(init=False)
    """Elements of a block."""
    up: int = field(init=False)
    """Bytes of its record on the way to whoever combines it."""
    down: int = field(init=False)
    """Bytes of its record on the way back."""
    records: Tensor | None = field(init=False, default=None)
    """This member's contribution, encoded at the first attempt."""

    @property
    @abstractmethod
    def encoding(self) -> str:
        """Name for messages and for the header, which makes sure that all members use the same."""

    def label(self, view: View) -> str:
        """See `Operation`."""
        return self.encoding

    def algorithms(self) -> tuple[str, ...]:
        """Names that `algorithm` may have."""
        return ("encoded",)

    def schedule(self, view: View) -> Schedule:
        """Build the only schedule there is, for all sizes."""
        return encoded.all_reduce(view.size, self._blocks, self.up, self.down)

    def source(self, view: View) -> Tensor:
        """This member's records, in order of blocks; they do not depend on the epoch."""
        if self.records is None:
            self.records = _pool.take(self._blocks * self.up, torch.uint8)
            self.encode(self.records)
        return self.records

    def plan(self, view: View) -> Plan:
        """Exchange, combine and share bytes."""
        mine = [piece for piece in encoded.pieces(view.size, self._blocks, self.up) if piece.rank == view.rank]
        kernels = {encoded.kernel(piece.number): partial(self._combine, piece, view) for piece in mine}
        return Plan(self.schedule(view), self.source(view), torch.uint8, ReduceOp.SUM, kernels)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Decode into the caller's memory, or into a new tensor."""
        values, first = _pool.take(self.tensor.numel(), self.work_dtype), 0
        for records in pieces:
            last = min(first + records.numel() // self.down * self.block, values.numel())
            self.decode(records, values[first:last])
            first = last
        if self.target is None:
            return values.to(self.tensor.dtype).view(self.tensor.shape)
        copy_out(values, self.target)
        return self.target

    @abstractmethod
    def encode(self, records: Tensor) -> None:
        """Encode this member's contribution into flat uint8 `records`."""

    @abstractmethod
    def combine(self, piece: Piece, slots: Tensor, view: View) -> Tensor:
        """Return the result (b, down) of the records (members, b, up) of a piece, uint8."""

    @abstractmethod
    def decode(self, records: Tensor, values: Tensor) -> None:
        """Decode flat uint8 records of the result into flat `values` of `work_dtype`."""

    @property
    def _blocks(self) -> int:
        return -(-self.tensor.numel() // self.block)

    def _combine(self, piece: Piece, view: View, staging: Tensor) -> None:
        """The kernel of a piece: its result takes the place of this member's own records."""
        slots = staging.view(view.size, piece.last - piece.first, self.up)
        made = self.combine(piece, slots, view)
        slots[view.rank].view(-1)[: made.numel()] = made.view(-1)

    def _check(self) -> None:
        AllReduce._check(self)
        if self.op not in self.ops:
            raise UsageError(f"all_reduce, {self.encoding}: op must be {' or '.join(self.ops)}, not {self.op!r}")
        if self.tensor.dtype not in self.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise UnsupportedTensor(f"all_reduce, {self.encoding}: the tensor is {self.tensor.dtype}; it takes {known}")
