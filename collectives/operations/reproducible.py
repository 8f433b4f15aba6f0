"""The reproducible all-reduce: the bits follow from the multiset of contributions, however the members hold them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from collectives import reproducible
from collectives.algorithms.encoded import Piece
from collectives.errors import UsageError
from collectives.operations.base import View
from collectives.operations.encoded import Encoded
from collectives.operations.tensors import check_tensor, flat
from collectives.reproducible import MOST, Accumulator


@dataclass(slots=True, kw_only=True)
class Reproducible(Encoded):
    """Each contribution counts by itself; an average divides by their number.

    Attributes:
        contributions: tensors like `tensor`, perhaps none; None: `tensor` itself is the only one.

    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    contributions: Sequence[Tensor] | None = None
    _accumulator: Accumulator = field(init=False)

    @property
    def encoding(self) -> str:
        """See `Encoded`."""
        return "reproducible"

    @property
    def reads(self) -> Sequence[Tensor]:
        """The contributions."""
        if self.snapshot:
            return ()
        return (self.tensor,) if self.contributions is None else self.contributions

    def encode(self, records: Tensor) -> None:
        """Accumulate all contributions of this member."""
        given = [self.input] if self.contributions is None else self.contributions
        self._accumulator.encode([flat(one.detach()) for one in given], self.tensor.numel(), records)

    def combine(self, piece: Piece, slots: Tensor, view: View) -> Tensor:
        """Add the accumulators and make numbers of them."""
        return self._accumulator.combine(slots, self.op == "avg")

    @property
    def work_dtype(self) -> torch.dtype:
        """Of the values before they become the tensor's."""
        return self._accumulator.dtype

    def decode(self, records: Tensor, values: Tensor) -> None:
        """See `Encoded`.

        Raises:
            UsageError: there were more contributions than an accumulator has room for; on every member alike.

        """
        count = self._accumulator.decode(records, values)
        if count > MOST:
            raise UsageError(f"{count} contributions to a reproducible sum, of {MOST} at most; add some up before")

    def _check(self) -> None:
        Encoded._check(self)
        for one in self.contributions or ():
            check_tensor(self.kind, one)
            if one.shape != self.tensor.shape or one.dtype != self.tensor.dtype:
                raise UsageError(
                    f"all_reduce: a contribution is {list(one.shape)} {one.dtype}, the result "
                    f"{list(self.tensor.shape)} {self.tensor.dtype}; they have to be alike"
                )
        if self.contributions is not None and self.snapshot:
            self.contributions = [one.detach().clone() for one in self.contributions]
        self._accumulator = reproducible.accumulator(self.tensor.dtype, self.tensor.numel())
        self.block, self.up, self.down = self._accumulator.block, self._accumulator.up, self._accumulator.down
