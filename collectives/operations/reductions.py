"""All-reduce, reduce and reduce-scatter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from collectives.errors import UnsupportedTensor, UsageError
from collectives.instructions import Kernel
from collectives.operations.base import Operation, Plan, View
from collectives.operations.tensors import brief, check_counts, check_out, check_rows, handed_over, row_size, turn_in
from collectives.reduction import ReduceOp

HALF = (torch.float16, torch.bfloat16)
REDUCIBLE = (
    torch.float32,
    torch.float64,
    *HALF,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
REDUCE_OPS = ("sum", "avg", "min", "max", "prod")


def check_reduction(kind: str, dtype: torch.dtype, op: str, ops: Sequence[str] = REDUCE_OPS) -> None:
    """Raise `UsageError` unless tensors of this dtype can be reduced by this op."""
    if op not in ops:
        raise UsageError(f"{kind}: op must be one of {', '.join(ops)}, not {op!r}")
    if dtype not in REDUCIBLE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in REDUCIBLE)
        raise UnsupportedTensor(f"{kind} cannot reduce {dtype}; it reduces {known}")
    if op == "avg" and not dtype.is_floating_point:
        raise UnsupportedTensor(f"{kind}: avg of {dtype} is not exact; use sum and divide")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Half precision is accumulated in single precision and rounded once, at the end."""
    return torch.float32 if dtype in HALF else dtype


@dataclass(slots=True, kw_only=True)
class Reduction(Operation):
    """What the reductions share: the reduce op and its dtypes."""

    def __post_init__(self) -> None:
        if isinstance(self.tensor, Tensor):
            check_reduction(self.kind, self.tensor.dtype, self.op)
        Operation.__post_init__(self)

    @property
    def work_dtype(self) -> torch.dtype:
        """Of accumulation."""
        return accumulator(self.tensor.dtype)

    @property
    def finish(self) -> bool:
        """An average divides at the end."""
        return self.op == "avg"

    def plan(self, view: View) -> Plan:
        """Sum and divide for an average."""
        kernels: dict[str, Kernel] = {"finish": lambda part: part.div_(view.size)}
        op = ReduceOp.SUM if self.finish else ReduceOp(self.op)
        return Plan(self.schedule(view), self.source(view), self.work_dtype, op, kernels if self.finish else {})


@dataclass(slots=True, kw_only=True)
class AllReduce(Reduction):
    """Every member ends with the reduction of all contributions: in place, in `out`, or in a new tensor."""

    kind: ClassVar[str] = "all_reduce"
    collective: ClassVar[str] = "all_reduce"
    inplace: bool = True
    out: Tensor | None = None

    @property
    def target(self) -> Tensor | None:
        """Where the result goes; None: to a new tensor."""
        return self.out if self.out is not None else self.tensor if self.inplace else None

    @property
    def writes(self) -> Sequence[Tensor]:
        """The target."""
        return () if self.target is None else (self.target,)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor | None:
        """Bring it into the target; without one the staging itself is handed over."""
        if self.target is not None:
            return turn_in(pieces, self.target)
        return handed_over(pieces, self.tensor.dtype).view(self.tensor.shape)

    def _check(self) -> None:
        if self.out is not None:
            check_out(self.kind, self.out, tuple(self.tensor.shape), self.tensor.dtype)


@dataclass(slots=True, kw_only=True)
class Reduce(AllReduce):
    """The root ends with the reduction of all contributions; the others with nothing, their tensors untouched."""

    kind: ClassVar[str] = "reduce"
    collective: ClassVar[str] = "reduce"

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor | None:
        """As an all-reduce at the root."""
        return AllReduce.deliver(self, pieces, view) if view.members[view.rank] == self.root else None


@dataclass(slots=True, kw_only=True)
class ReduceScatter(Reduction):
    """Rank r ends with the reduction of rows r*k to (r+1)*k of all contributions, k = shape[0] / size."""

    kind: ClassVar[str] = "reduce_scatter"
    collective: ClassVar[str] = "reduce_scatter"
    shrinks: ClassVar[bool] = False

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Return a tensor of shape (k, ...)."""
        return handed_over(pieces, self.tensor.dtype).view(self.rows(view), *self.tensor.shape[1:])

    def rows(self, view: View) -> int:
        """How many rows are this member's."""
        return self.tensor.shape[0] // view.size

    def _check(self) -> None:
        check_rows(self.kind, self.tensor, self.view.size)


@dataclass(slots=True, kw_only=True)
class ReduceScatterV(ReduceScatter):
    """The same with `row_counts[r]` rows for rank r."""

    kind: ClassVar[str] = "reduce_scatter_v"
    row_counts: Sequence[int]

    def label(self, view: View) -> str:
        """The counts must be equal, too."""
        return f"{self.algorithm_in(view)}, counts {brief(str(list(self.row_counts)))}"

    def counts(self, view: View) -> tuple[int, ...]:
        """In elements."""
        return tuple(rows * row_size(self.tensor) for rows in self.row_counts)

    def rows(self, view: View) -> int:
        """As counted."""
        return self.row_counts[view.rank]

    def _check(self) -> None:
        total = self.tensor.shape[0] if self.tensor.dim() else 0
        self.row_counts = check_counts(self.kind, "counts", self.row_counts, self.view.size, total)
