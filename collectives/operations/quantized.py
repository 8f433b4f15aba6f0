"""The quantized all-reduce: contributions and result travel in a codec of fewer bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from collectives import quantize
from collectives.algorithms.encoded import Piece
from collectives.error_feedback import Residual
from collectives.errors import UsageError
from collectives.operations.base import Plan, View
from collectives.operations.encoded import Encoded
from collectives.operations.tensors import flat
from collectives.quantize import BLOCK, Codec, Noise


@dataclass(slots=True, kw_only=True)
class Quantized(Encoded):
    """Sums are fp32, in the order of ranks.

    Attributes:
        codec: a name of `quantize.CODECS`.
        rounding: a name of `quantize.ROUNDINGS`.
        feedback: where this member keeps what rounding left out.

    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    codec: str
    rounding: str = "nearest"
    feedback: Residual | None = None
    _codec: Codec = field(init=False)
    _left: Tensor | None = field(init=False, default=None)
    """With feedback: what encoding left out of this member's contribution."""
    _owed: list[tuple[int, Tensor]] = field(init=False, default_factory=list)
    """With feedback: from which element on, and what encoding left out of the sums combined in the last attempt."""

    @property
    def encoding(self) -> str:
        """See `Encoded`."""
        return f"{self.codec}/{self.rounding}"

    def plan(self, view: View) -> Plan:
        """See `Encoded`; what earlier attempts combined is forgotten."""
        self._owed = []
        return Encoded.plan(self, view)

    def encode(self, records: Tensor) -> None:
        """Encode the input and, with feedback, what is left of earlier ones."""
        values = flat(self.input)
        if self.feedback is None:
            self._codec.encode(values, records, self._noise(0))
            return
        residual = self.feedback.get()
        values = values.to(torch.float32) if residual is None else values + residual
        self._codec.encode(values, records, self._noise(0))
        self._left = torch.empty_like(values)
        self._codec.decode(records, self._left)
        torch.sub(values, self._left, out=self._left)

    def combine(self, piece: Piece, slots: Tensor, view: View) -> Tensor:
        """Decode, add in the order of ranks, divide for an average, encode."""
        total, one = torch.empty(2, slots.shape[1] * BLOCK)
        self._codec.decode(slots[0].view(-1), total)
        for slot in slots[1:]:
            self._codec.decode(slot.view(-1), one)
            total += one
        if self.op == "avg":
            total /= view.size
        made = torch.empty(slots.shape[1:], dtype=torch.uint8)
        self._codec.encode(total, made.view(-1), self._noise(1 + piece.number))
        if self.feedback is not None:
            self._codec.decode(made.view(-1), one)
            self._owed.append((piece.first * BLOCK, (total - one) * (view.size if self.op == "avg" else 1)))
        return made

    def decode(self, records: Tensor, values: Tensor) -> None:
        """See `Encoded`. Everybody decodes, also who encoded: so all have the same bits."""
        self._codec.decode(records, values)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """See `Encoded`. The operation is complete: now the residual may change (rule R8)."""
        result = Encoded.deliver(self, pieces, view)
        if self.feedback is not None and self._left is not None:
            for start, error in self._owed:
                part = self._left[start : start + error.numel()]
                part += error[: part.numel()]
            self.feedback.commit(self._left.nan_to_num_(0.0, 0.0, 0.0))
        return result

    def _noise(self, part: int) -> Noise | None:
        """Random numbers that follow from the operation and the member alone: runs can be repeated (rule R8)."""
        if self.rounding == "nearest":
            return None
        return Noise(part, self.seq, self.view.members[self.view.rank], self.lane)

    def _check(self) -> None:
        self._codec = quantize.find(self.codec, self.rounding)
        Encoded._check(self)
        self.block, self.up, self.down = BLOCK, self._codec.record, self._codec.record
        residual = self.feedback.get() if self.feedback is not None else None
        if residual is not None and self.feedback is not None and residual.numel() != self.tensor.numel():
            raise UsageError(
                f"the residual {self.feedback.name!r} is of {residual.numel()} elements, the tensor has "
                f"{self.tensor.numel()}; use another name for another tensor"
            )
