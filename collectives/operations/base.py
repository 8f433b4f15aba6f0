"""What all calls share: what the caller saw, what is compared between the members, and how an attempt is planned.

A `Call` is what a lane runs: one `Operation`, or a few of them in a row (`composite`). An operation never writes the
caller's memory before `deliver`, so it can be planned and run again for another epoch from untouched inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from collectives import choice
from collectives.errors import UsageError
from collectives.instructions import Kernel
from collectives.operations.tensors import check_tensor, flat
from collectives.outcome import Outcome
from collectives.reduction import ReduceOp
from collectives.schedule import Schedule

ON_LOSS = ("retry", "raise")


@dataclass(frozen=True, slots=True)
class View:
    """An epoch as one member sees it: its number, the members by rank, this member's rank, the run's transport.

    `hosts` has the number of each rank's host, where there are several; `order` the rank at each position of rings,
    where that is not the order of ranks.
    """

    epoch: int
    members: tuple[int, ...]
    rank: int
    transport: str = ""
    hosts: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

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
class Call(ABC):
    """What a member asks for.

    Attributes:
        lane: which lane it runs on.
        on_loss: "retry": survivors run it again where its kind allows; "raise": `MemberLost` after any loss.
        algorithm: "auto" or a name of `choice.names(collective)`.
        view: the ranks that the caller saw when it issued the call.
        snapshot: copy the input now, so that the caller may change it while the call is under way.

    """

    kind: ClassVar[str]
    """What the members compare, and what errors and fault points say."""
    collective: ClassVar[str]
    """The kind of its schedule, as `choice` knows it."""
    lane: str
    on_loss: str = "retry"
    algorithm: str = "auto"
    view: View
    snapshot: bool = False

    def __post_init__(self) -> None:
        if self.on_loss not in ON_LOSS:
            raise UsageError(f"{self.kind}: on_loss must be one of {', '.join(ON_LOSS)}, not {self.on_loss!r}")
        if self.algorithm != "auto" and self.algorithm not in self.algorithms():
            known = ", ".join(("auto", *self.algorithms()))
            raise UsageError(f"{self.kind}: unknown algorithm {self.algorithm!r}; there are {known}")

    def algorithms(self) -> tuple[str, ...]:
        """Names that `algorithm` may have."""
        return choice.names(self.collective)

    def preflight(self) -> None:  # noqa: B027 - most have nothing to refuse then
        """Raise `UsageError` if it cannot be done among those whom the caller sees; called before it is queued."""

    @abstractmethod
    def run(self, execute: Callable[["Operation"], Outcome]) -> Outcome:
        """Run it to its end by means of `execute`, which does so with one operation."""

    @property
    def reads(self) -> Sequence[Tensor]:
        """The caller's tensors that must not change before the outcome."""
        return ()

    @property
    def writes(self) -> Sequence[Tensor]:
        """The caller's tensors that the result is written to."""
        return ()


@dataclass(slots=True, kw_only=True)
class Operation(Call):
    """One collective among the members of an epoch.

    Attributes:
        tensor: the caller's tensor.
        op: reduce op of a reduction.
        root: member id of the root of a rooted kind, 0 for others.
        contents: what the tensor is packed from, where it is; must be equal on all members.
        seq: number of the operation on its lane, the same on every member; set before it is planned.

    """

    shrinks: ClassVar[bool] = True
    """Whether fewer members may run it again (rule R6): the shape of the result does not depend on the membership."""
    lift: ClassVar[bool] = True
    """See `Engine.run`. False where the result is copied anyway."""
    tensor: Tensor
    op: str = ""
    root: int = 0
    contents: str = ""
    seq: int = field(init=False, default=0)
    input: Tensor = field(init=False)

    def __post_init__(self) -> None:
        check_tensor(self.kind, self.tensor)
        Call.__post_init__(self)
        if self.root and self.root not in self.view.members:
            members = ", ".join(map(str, self.view.members))
            raise UsageError(f"{self.kind}: root {self.root} is no member; the members are {members} (ids, not ranks)")
        self.input = self.tensor.detach().clone() if self.snapshot else self.tensor.detach()
        self._check()

    def preflight(self) -> None:
        """An algorithm that was asked for by name may not serve this world."""
        if self.algorithm != "auto":
            self.schedule(self.view)

    def run(self, execute: Callable[["Operation"], Outcome]) -> Outcome:
        """Execute it."""
        return execute(self)

    @property
    def reads(self) -> Sequence[Tensor]:
        """The tensor, unless there is a snapshot of it."""
        return () if self.snapshot else (self.tensor,)

    @property
    def elastic(self) -> bool:
        """Whether the survivors of a loss run it again, but for a lost root."""
        return self.on_loss == "retry" and self.shrinks

    # --- what the header says, with the dtype, the reduce op and the root ---

    @property
    def shape(self) -> tuple[int, ...]:
        """The part of the shape that must be equal on all members."""
        return tuple(self.tensor.shape)

    def label(self, view: View) -> str:
        """What else must be equal: the algorithm, and what the schedule depends on besides."""
        return ", ".join(filter(None, (self.algorithm_in(view), self.contents)))

    # --- planning; all of it follows from the epoch and the arguments alone (rule R8) ---

    @property
    def work_dtype(self) -> torch.dtype:
        """In which dtype data are moved and reduced."""
        return self.tensor.dtype

    @property
    def finish(self) -> bool:
        """Whether the kernel "finish" runs on what is reduced."""
        return False

    def count(self, view: View) -> int:
        """Elements of the work buffer, for a world of any size."""
        return self.tensor.numel()

    def counts(self, view: View) -> tuple[int, ...] | None:
        """Elements of its parts; None: equal ones."""
        return None

    def algorithm_in(self, view: View) -> str:
        """Name of the algorithm: the caller's choice, or what suits the number of bytes."""
        if self.algorithm != "auto":
            return self.algorithm
        nbytes = self.count(view) * self.work_dtype.itemsize
        return _choose(self.collective, view.size, nbytes, view.transport, view.hosts)

    def schedule(self, view: View) -> Schedule:
        """Build the schedule for these ranks. Raises `UsageError` if the algorithm has none."""
        root = view.members.index(self.root) if self.root else 0
        return _build(
            self.collective,
            self.algorithm_in(view),
            view.size,
            self.count(view),
            self.finish,
            root,
            self.counts(view),
            view.hosts,
            view.order,
        )

    def source(self, view: View) -> Tensor:
        """What this member holds at the start, flat and contiguous."""
        return flat(self.input)

    def plan(self, view: View) -> Plan:
        """Plan an attempt in the epoch of `view`."""
        return Plan(self.schedule(view), self.source(view), self.work_dtype, ReduceOp.SUM, {}, self.lift)

    @abstractmethod
    def deliver(self, pieces: Sequence[Tensor], view: View) -> Tensor | None:
        """Give the result of a complete attempt to the caller; returns `Outcome.result`.

        `pieces` are the ranges that the schedule wants, in order, flat; those next to each other in staging as one.
        With `lift` False they may be parts of `Plan.source`.
        """

    def _check(self) -> None:
        """Raise `UsageError` for arguments that cannot be."""


@lru_cache(maxsize=1024)
def _choose(kind: str, world: int, nbytes: int, transport: str, hosts: tuple[int, ...] | None) -> str:
    """Remember what was chosen: it is asked for with every operation."""
    return choice.choose(kind, world, nbytes, profile=transport, hosts=hosts)


@lru_cache(maxsize=256)
def _build(
    kind: str,
    algorithm: str,
    world: int,
    count: int,
    finish: bool,
    root: int,
    counts: tuple[int, ...] | None,
    hosts: tuple[int, ...] | None,
    order: tuple[int, ...] | None,
) -> Schedule:
    """Remember what was built, as above."""
    return choice.build(
        kind, algorithm, world, count, finish=finish, root=root, counts=counts, order=order, hosts=hosts
    )
