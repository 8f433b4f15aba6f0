"""The collective operations: for each, its schedule for a given epoch, and what becomes of the staged result.

The communicator makes these values from its callers' arguments; `group.py` runs them. An operation never writes the
caller's memory before `deliver`, so it can be planned and run again for another epoch from untouched inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from collectives.algorithms import bidirectional, doubling, ring
from collectives.errors import UnsupportedTensor, UsageError
from collectives.instructions import Kernel
from collectives.reduction import ReduceOp
from collectives.schedule import Schedule
from collectives.staging import copy_out

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
ON_LOSS = ("retry", "raise")
SMALL_BYTES = 64 * 1024
"""All-reduces of up to this many bytes use recursive doubling: few rounds matter more there than few bytes."""

_RINGS = {"ring": ring, "bidirectional": bidirectional}


@dataclass(frozen=True, slots=True)
class View:
    """An epoch as one member sees it: its number, the members by rank, and this member's rank."""

    epoch: int
    members: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """World size."""
        return len(self.members)


@dataclass(frozen=True, slots=True)
class Plan:
    """One attempt of an operation in one epoch, for the engine.

    `source` is flat and contiguous and holds the elements of `schedule.held(rank)`; the work buffer has `dtype`. See
    `Engine.run` for `lift`.
    """

    schedule: Schedule
    source: Tensor
    dtype: torch.dtype
    op: ReduceOp
    kernels: Mapping[str, Kernel]
    lift: bool = True


@dataclass(slots=True, kw_only=True)
class Operation(ABC):
    """One call of a collective.

    Attributes:
        tensor: the caller's tensor.
        lane: which lane it runs on.
        on_loss: "retry": survivors run it again where its kind allows; "raise": `MemberLost` after any loss.
        algorithm: "auto" or a name.
        view: the ranks that the caller saw when it issued the operation.
        snapshot: copy the input now, so that the caller may change it while the operation is under way.
        op: reduce op of a reduction.
        root: member id of the root of a broadcast, 0 for others.
        seq: number of the operation on its lane, the same on every member; set before it is planned.

    """

    kind: ClassVar[str]
    tensor: Tensor
    lane: str
    on_loss: str
    algorithm: str = "auto"
    view: View
    snapshot: bool = False
    op: str = ""
    root: int = 0
    seq: int = field(init=False, default=0)
    input: Tensor = field(init=False)

    def __post_init__(self) -> None:
        check_tensor(self.kind, self.tensor)
        if self.on_loss not in ON_LOSS:
            raise UsageError(f"{self.kind}: on_loss must be one of {', '.join(ON_LOSS)}, not {self.on_loss!r}")
        if self.algorithm not in ("auto", *self.algorithms()):
            known = ", ".join(("auto", *self.algorithms()))
            raise UsageError(f"{self.kind}: unknown algorithm {self.algorithm!r}; there are {known}")
        self.input = self.tensor.detach().clone() if self.snapshot else self.tensor.detach()

    @property
    def label(self) -> str:
        """What the header says of the algorithm; with the rest of it and the epoch the schedule follows."""
        return self.algorithm

    @property
    def elastic(self) -> bool:
        """Whether fewer members may run it again: the shape of the result does not depend on the membership."""
        return self.on_loss == "retry"

    def algorithms(self) -> tuple[str, ...]:
        """Names that `algorithm` may have."""
        return tuple(_RINGS)

    @abstractmethod
    def plan(self, view: View) -> Plan:
        """Plan an attempt in the epoch of `view`; follows from the epoch and the arguments alone (rule R8)."""

    @abstractmethod
    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor | None:
        """Give the result of a complete attempt to the caller; returns `Outcome.result`.

        `pieces` are the ranges that the schedule wants, in order, flat; those next to each other in staging as one.
        """

    def _source(self) -> Tensor:
        """The input, flat. Of one element or none every stride counts as contiguous; the engine reads with stride 1."""
        flat = self.input.contiguous().view(-1)
        return flat.as_strided((flat.numel(),), (1,))


@dataclass(slots=True, kw_only=True)
class Reduction(Operation):
    """What all-reduce and reduce-scatter share: the reduce op and its dtypes."""

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if self.op not in REDUCE_OPS:
            raise UsageError(f"{self.kind}: op must be one of {', '.join(REDUCE_OPS)}, not {self.op!r}")
        if self.tensor.dtype not in REDUCIBLE:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in REDUCIBLE)
            raise UnsupportedTensor(f"{self.kind} cannot reduce {self.tensor.dtype}; it reduces {known}")
        if self.op == "avg" and not self.tensor.dtype.is_floating_point:
            raise UnsupportedTensor(f"{self.kind}: avg of {self.tensor.dtype} is not exact; use sum and divide")

    @property
    def work_dtype(self) -> torch.dtype:
        """Half precision is accumulated in single precision and rounded once, at the end."""
        return torch.float32 if self.tensor.dtype in HALF else self.tensor.dtype

    def _plan(self, schedule: Schedule, view: View) -> Plan:
        kernels: dict[str, Kernel] = {"finish": lambda part: part.div_(view.size)}
        op = ReduceOp.SUM if self.op == "avg" else ReduceOp(self.op)
        return Plan(schedule, self._source(), self.work_dtype, op, kernels if self.op == "avg" else {})


@dataclass(slots=True, kw_only=True)
class AllReduce(Reduction):
    """Every member ends with the reduction of all contributions."""

    kind: ClassVar[str] = "all_reduce"
    inplace: bool = True
    out: Tensor | None = None

    def __post_init__(self) -> None:
        Reduction.__post_init__(self)
        if self.out is not None:
            check_out(self.kind, self.out, tuple(self.tensor.shape), self.tensor.dtype)

    def algorithms(self) -> tuple[str, ...]:
        """Names that `algorithm` may have."""
        return (*_RINGS, "doubling")

    def plan(self, view: View) -> Plan:
        """Recursive doubling for small tensors, a ring for others."""
        count, finish = self.tensor.numel(), self.op == "avg"
        name = self.algorithm
        if name == "auto":
            name = "doubling" if count * self.work_dtype.itemsize <= SMALL_BYTES else "ring"
        module = doubling if name == "doubling" else _RINGS[name]
        return self._plan(module.all_reduce(view.size, count, finish), view)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """In place and `out` are a copy; else the staging itself is handed over."""
        if self.out is not None or self.inplace:
            target = self.out if self.out is not None else self.tensor
            copy_out(joined(pieces, self.work_dtype), target)
            return target
        return joined(pieces, self.work_dtype).to(self.tensor.dtype).view(self.tensor.shape)


@dataclass(slots=True, kw_only=True)
class ReduceScatter(Reduction):
    """Rank r ends with the reduction of rows r*k to (r+1)*k of all contributions, k = shape[0] / size."""

    kind: ClassVar[str] = "reduce_scatter"

    def __post_init__(self) -> None:
        Reduction.__post_init__(self)
        rows = self.tensor.shape[0] if self.tensor.dim() else 0
        if not self.tensor.dim() or rows % self.view.size:
            shape = list(self.tensor.shape)
            raise UsageError(f"reduce_scatter: shape {shape} cannot be cut in {self.view.size} equal parts along dim 0")

    @property
    def elastic(self) -> bool:
        """Never: a survivor's share is another one after a loss (rule R6)."""
        return False

    def plan(self, view: View) -> Plan:
        """The first half of the ring all-reduce."""
        module = _RINGS["ring" if self.algorithm == "auto" else self.algorithm]
        return self._plan(module.reduce_scatter(view.size, self.tensor.numel(), self.op == "avg"), view)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Return a tensor of shape (shape[0] / size, ...)."""
        mine = joined(pieces, self.work_dtype)
        shape = (self.tensor.shape[0] // view.size, *self.tensor.shape[1:])
        return mine.to(self.tensor.dtype, copy=True).view(shape)


@dataclass(slots=True, kw_only=True)
class AllGather(Operation):
    """Every member ends with the contributions of all, a row each, in rank order."""

    kind: ClassVar[str] = "all_gather"
    out: Tensor | None = None

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if self.out is not None:
            check_out(self.kind, self.out, (self.view.size, *self.tensor.shape), self.tensor.dtype)

    @property
    def elastic(self) -> bool:
        """Unless a preallocated output fixes the number of rows (rule R6)."""
        return self.on_loss == "retry" and self.out is None

    def plan(self, view: View) -> Plan:
        """The second half of the ring all-reduce."""
        module = _RINGS["ring" if self.algorithm == "auto" else self.algorithm]
        schedule = module.all_gather(view.size, view.size * self.tensor.numel())
        return Plan(schedule, self._source(), self.tensor.dtype, ReduceOp.SUM, {})

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Hand over the staging as (contributors, *shape), or copy it to `out`."""
        rows = joined(pieces, self.tensor.dtype)
        if self.out is None:
            return rows.view(view.size, *self.tensor.shape)
        copy_out(rows, self.out)
        return self.out


@dataclass(slots=True, kw_only=True)
class Broadcast(Operation):
    """Every member ends with the root's tensor, in place. `root` is a member id."""

    kind: ClassVar[str] = "broadcast"

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if self.root not in self.view.members:
            members = ", ".join(map(str, self.view.members))
            raise UsageError(f"broadcast: root {self.root} is no member; the members are {members} (ids, not ranks)")

    def plan(self, view: View) -> Plan:
        """A chain from the root, cut in segments by the engine."""
        module = _RINGS["ring" if self.algorithm == "auto" else self.algorithm]
        root = view.members.index(self.root)
        source = self._source()
        schedule = module.broadcast(view.size, source.numel(), root)
        return Plan(schedule, source if view.rank == root else source[:0], source.dtype, ReduceOp.SUM, {}, lift=False)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Copy to the caller's tensor, but for the root, which has it."""
        if view.members[view.rank] != self.root:
            copy_out(joined(pieces, self.tensor.dtype), self.tensor)
        return self.tensor


@dataclass(slots=True, kw_only=True)
class Barrier(Operation):
    """Nobody returns before everybody entered: the confirmation of an operation without data."""

    kind: ClassVar[str] = "barrier"

    def plan(self, view: View) -> Plan:
        """A broadcast of nothing: the confirmation behind it is the barrier."""
        return Plan(ring.broadcast(view.size, 0, 0), self.tensor, self.tensor.dtype, ReduceOp.SUM, {})

    def deliver(self, pieces: Sequence[Tensor], view: View) -> None:
        """Return nothing."""


@dataclass(slots=True, kw_only=True)
class Exchange(Operation):
    """Runs a given schedule on the caller's flat buffer, in place."""

    kind: ClassVar[str] = "exchange"
    schedule: Schedule
    kernels: Mapping[str, Kernel]

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        if self.tensor.dim() != 1 or self.tensor.numel() != self.schedule.count or not self.tensor.is_contiguous():
            shape, count = list(self.tensor.shape), self.schedule.count
            raise UsageError(f"run: the schedule needs a flat contiguous buffer of {count} elements, not shape {shape}")
        if self.schedule.world != self.view.size:
            raise UsageError(f"run: a schedule for a world of {self.schedule.world}, but there are {self.view.size}")

    @property
    def label(self) -> str:
        """Name and length of the schedule."""
        return f"{self.schedule.kind}/{self.schedule.algorithm}/{len(self.schedule)}"

    @property
    def elastic(self) -> bool:
        """Never: the schedule is for this world."""
        return False

    def plan(self, view: View) -> Plan:
        """The schedule as given; its name and size are compared as part of the header."""
        source = self._source()
        held = self.schedule.held(view.rank)
        if held != ((0, source.numel()),):
            parts = [source[start:stop] for start, stop in held]
            source = torch.cat(parts) if parts else source[:0]
        return Plan(self.schedule, source, self.tensor.dtype, ReduceOp(self.op), self.kernels)

    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor:
        """Copy the wanted ranges into the buffer."""
        result, taken = joined(pieces, self.tensor.dtype), 0
        for start, stop in self.schedule.wanted(view.rank):
            copy_out(result[taken : taken + stop - start], self.tensor.detach()[start:stop])
            taken += stop - start
        return self.tensor


def joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The pieces as one flat tensor: the only one itself, several copied behind each other."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces)) if pieces else torch.empty(0, dtype=dtype)


def check_tensor(kind: str, tensor: Tensor) -> None:
    """Raise `UnsupportedTensor` unless it is a dense CPU tensor."""
    if not isinstance(tensor, Tensor):
        raise UnsupportedTensor(f"{kind} takes a tensor, not {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise UnsupportedTensor(f"{kind} takes CPU tensors; this one is on {tensor.device}: move it with .cpu()")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UnsupportedTensor(f"{kind} takes dense tensors, not layout {tensor.layout}")


def check_out(kind: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise `UsageError` unless `out` can take the result."""
    check_tensor(kind, out)
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise UsageError(f"{kind}: out is {list(out.shape)} {out.dtype}, the result is {list(shape)} {dtype}")
