"""All-reduces of encoded contributions: quantized, with a codec, and reproducible, with exact accumulators.

`Collectives.all_reduce` makes these operations for `codec=` and `reproducible=True`; `group.py` runs them. Both are one
schedule (`collectives.algorithms.encoded`), so a loss in the middle repeats all of it among the survivors, from what
was encoded once from untouched inputs: the result never mixes contributors. They differ in what a record is.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from collectives import quantize, reproducible
from collectives.algorithms import encoded
from collectives.error_feedback import Residual
from collectives.errors import UnsupportedTensor, UsageError
from collectives.operations import AllReduce, Operation, Plan, View
from collectives.operations.tensors import check_out, check_tensor, flat
from collectives.quantize import BLOCK, Codec, Noise
from collectives.reduction import ReduceOp
from collectives.reproducible import MOST, Accumulator
from collectives.schedule import Schedule
from collectives.staging import copy_out

OPS = ("sum", "avg")


@dataclass(slots=True, kw_only=True)
class Encoded(Operation):
    """What both share: the schedule, and the way from records to the caller's tensor."""

    kind: ClassVar[str] = "all_reduce"
    collective: ClassVar[str] = "all_reduce"
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    inplace: bool = True
    out: Tensor | None = None
    block: int = field(init=False)
    """Elements of a block."""
    up: int = field(init=False)
    """Bytes of its record on the way to whoever combines it."""
    down: int = field(init=False)
    """Bytes of its record on the way back."""
    records: Tensor | None = field(init=False, default=None)
    """This member's contribution, encoded at the first attempt."""

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if self.op not in OPS:
            raise UsageError(f"all_reduce with {self.what}: op must be {' or '.join(OPS)}, not {self.op!r}")
        if self.tensor.dtype not in self.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise UnsupportedTensor(f"all_reduce with {self.what} takes {known}, not {self.tensor.dtype}")
        if self.out is not None:
            check_out(self.kind, self.out, tuple(self.tensor.shape), self.tensor.dtype)

    @property
    @abstractmethod
    def what(self) -> str:
        """Name of the encoding for messages and for the header, which makes sure that all members use the same."""

    def label(self, view: View) -> str:
        """See `Operation`."""
        return self.what

    @property
    def writes(self) -> Sequence[Tensor]:
        """See `Call`."""
        return (self.out,) if self.out is not None else (self.tensor,) if self.inplace else ()

    def algorithms(self) -> tuple[str, ...]:
        """Names that `algorithm` may have."""
        return ("encoded",)

    def schedule(self, view: View) -> Schedule:
        """The same for all sizes."""
        return encoded.all_reduce(view.size, -(-self.tensor.numel() // self.block), self.up, self.down)

    def plan(self, view: View) -> Plan:
        """A member's records do not depend on the epoch."""
        blocks = -(-self.tensor.numel() // self.block)
        if self.records is None:
            self.records = torch.empty(blocks * self.up, dtype=torch.uint8)
            self.encode(self.records)
        mine = [piece for piece in encoded.pieces(view.size, blocks, self.up) if piece.rank == view.rank]
        kernels = {encoded.kernel(piece.number): partial(self._combine, piece, view) for piece in mine}
        return Plan(self.schedule(view), self.records, torch.uint8, ReduceOp.SUM, kernels)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Decode into the caller's memory, or into a new tensor."""
        target = self.writes[0] if self.writes else torch.empty(self.tensor.shape, dtype=self.tensor.dtype)
        copy_out(self.decode(pieces), target)
        return target

    @abstractmethod
    def encode(self, records: Tensor) -> None:
        """Encode this member's contribution into flat uint8 `records`."""

    @abstractmethod
    def combine(self, piece: encoded.Piece, slots: Tensor, view: View) -> Tensor:
        """Return the result (b, down) of the records (members, b, up) of a piece, uint8."""

    @abstractmethod
    def decode(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the result, flat, from its records in order of blocks."""

    def _combine(self, piece: encoded.Piece, view: View, staging: Tensor) -> None:
        slots = staging.view(view.size, piece.last - piece.first, self.up)
        made = self.combine(piece, slots, view)
        slots[view.rank].view(-1)[: made.numel()] = made.view(-1)


@dataclass(slots=True, kw_only=True)
class Quantized(Encoded):
    """Contributions and result travel in a codec of fewer bytes; sums are fp32, in the order of ranks."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    codec: str
    rounding: str = "nearest"
    feedback: Residual | None = None
    _codec: Codec = field(init=False)
    _left: Tensor | None = field(init=False, default=None)
    """With feedback: what encoding left out of this member's contribution."""
    _owed: list[tuple[int, Tensor]] = field(init=False, default_factory=list)
    """With feedback: from which element on, and what encoding left out of the sums combined in the last attempt."""

    def __post_init__(self) -> None:
        self._codec = quantize.find(self.codec, self.rounding)
        Encoded.__post_init__(self)
        self.block, self.up, self.down = BLOCK, self._codec.record, self._codec.record
        residual = self.feedback.get() if self.feedback is not None else None
        if residual is not None and self.feedback is not None and residual.numel() != self.tensor.numel():
            raise UsageError(
                f"the residual {self.feedback.name!r} is of {residual.numel()} elements, the tensor has "
                f"{self.tensor.numel()}; use another name for another tensor"
            )

    @property
    def what(self) -> str:
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

    def combine(self, piece: encoded.Piece, slots: Tensor, view: View) -> Tensor:
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

    def decode(self, pieces: Sequence[Tensor]) -> Tensor:
        """See `Encoded`. Everybody decodes, also who encoded: so all have the same bits."""
        values, first = torch.empty(self.tensor.numel()), 0
        for records in pieces:
            last = min(first + records.numel() // self.down * BLOCK, values.numel())
            self._codec.decode(records, values[first:last])
            first = last
        self._commit()
        return values

    def _commit(self) -> None:
        """The operation is complete: now the residual may change (rule R8)."""
        if self.feedback is None or self._left is None:
            return
        for start, error in self._owed:
            part = self._left[start : start + error.numel()]
            part += error[: part.numel()]
        self.feedback.commit(self._left.nan_to_num_(0.0, 0.0, 0.0))

    def _noise(self, part: int) -> Noise | None:
        """Random numbers that follow from the operation and the member alone: runs can be repeated (rule R8)."""
        if self.rounding == "nearest":
            return None
        return Noise(part, self.seq, self.view.members[self.view.rank], self.lane)


@dataclass(slots=True, kw_only=True)
class Reproducible(Encoded):
    """The bits of the result follow from the multiset of contributions alone, however members hold them.

    Attributes:
        contributions: tensors like `tensor`, perhaps none; None: `tensor` itself is the only one.

    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    contributions: Sequence[Tensor] | None = None
    _accumulator: Accumulator = field(init=False)

    def __post_init__(self) -> None:
        Encoded.__post_init__(self)
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

    @property
    def what(self) -> str:
        """See `Encoded`."""
        return "reproducible"

    def encode(self, records: Tensor) -> None:
        """Accumulate all contributions of this member."""
        given = [self.input] if self.contributions is None else self.contributions
        flat = [one.detach().contiguous().view(-1) for one in given]
        self._accumulator.encode(flat, self.tensor.numel(), records)

    def combine(self, piece: encoded.Piece, slots: Tensor, view: View) -> Tensor:
        """Add the accumulators and make numbers of them."""
        return self._accumulator.combine(slots, self.op == "avg")

    def decode(self, pieces: Sequence[Tensor]) -> Tensor:
        """See `Encoded`.

        Raises:
            UsageError: there were more contributions than an accumulator has room for; on every member alike.

        """
        values, first = torch.empty(self.tensor.numel(), dtype=self._accumulator.dtype), 0
        for records in pieces:
            last = min(first + records.numel() // self.down * self.block, values.numel())
            count = self._accumulator.decode(records, values[first:last])
            if count > MOST:
                raise UsageError(
                    f"{count} contributions to a reproducible sum; there may be {MOST}: add some up before"
                )
            first = last
        return values


def all_reduce(
    *,
    codec: str | None = None,
    rounding: str | None = None,
    feedback: Residual | None = None,
    reproducible: bool = False,
    contributions: Sequence[Tensor] | None = None,
    **given: Any,
) -> Operation:
    """Make the all-reduce that is asked for: plain, `Quantized` or `Reproducible`; `given` is what these share.

    Raises:
        UsageError: the keywords contradict each other.

    """
    if codec is not None and reproducible:
        raise UsageError("all_reduce: a codec rounds, so the sum cannot be reproducible; give one of the two")
    if codec is None and (rounding is not None or feedback is not None):
        raise UsageError("all_reduce: rounding and feedback belong to a codec; name one")
    if contributions is not None and not reproducible:
        raise UsageError("all_reduce: several contributions of one member need reproducible=True; else add them up")
    if codec is not None:
        return Quantized(codec=codec, rounding=rounding or "nearest", feedback=feedback, **given)
    if reproducible:
        return Reproducible(contributions=contributions, **given)
    return AllReduce(**given)
