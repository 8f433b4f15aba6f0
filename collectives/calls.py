"""The collective operations as methods; `Communicator` adds who is here and when that may change.

What all operations share:

- tensors are CPU tensors, dense, of any strides; inputs must be left alone until the outcome (`snapshot=True` copies
  them), results appear in the caller's memory only when every member has staged them;
- `async_op=True` returns a `Work` at once; `lane` names the queue that the operation runs in, in order of the calls;
- `on_loss="retry"` lets the survivors run it again where the kind allows that; with "raise" every survivor gets
  `MemberLost` and the lane stays halted until `Communicator.resume`;
- errors: `MemberLost`, `DescriptorMismatch`, `CrossedWaits` on every member alike; `Evicted`, `QuorumLost`,
  `CoordinatorUnreachable` where this member is out of the run; `UsageError` before anything was sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from collectives import encoded
from collectives.error_feedback import Residual
from collectives.membership.member import MAIN
from collectives.operations import AllGather, Barrier, Broadcast, Exchange, Operation, ReduceScatter, View
from collectives.outcome import Outcome, Work
from collectives.schedule import Schedule


class How(TypedDict, total=False):
    """Keywords that every operation takes; see the module."""

    lane: str
    on_loss: str
    algorithm: str
    snapshot: bool


class HowToReduce(How, total=False):
    """Keywords that all-reduce takes besides; see `Collectives.all_reduce`."""

    codec: str | None
    rounding: str
    feedback: Residual | None
    reproducible: bool
    contributions: Sequence[Tensor] | None


class Collectives(ABC):
    """The operations."""

    @abstractmethod
    def _start(self, operation: Operation, async_op: bool) -> Outcome | Work:
        """Run the operation and return its outcome, or queue it and return its work."""

    @abstractmethod
    def _view(self, lane: str) -> View:
        """Return the ranks that the caller of a lane sees."""

    @overload
    def all_reduce(
        self,
        tensor: Tensor,
        op: str = ...,
        *,
        inplace: bool = ...,
        out: Tensor | None = ...,
        async_op: Literal[False] = ...,
        **how: Unpack[HowToReduce],
    ) -> Outcome: ...
    @overload
    def all_reduce(
        self,
        tensor: Tensor,
        op: str = ...,
        *,
        inplace: bool = ...,
        out: Tensor | None = ...,
        async_op: Literal[True],
        **how: Unpack[HowToReduce],
    ) -> Work: ...
    def all_reduce(
        self,
        tensor: Tensor,
        op: str = "sum",
        *,
        inplace: bool = True,
        out: Tensor | None = None,
        async_op: bool = False,
        **how: Unpack[HowToReduce],
    ) -> Outcome | Work:
        """Reduce over all members; every member gets the same bits.

        Args:
            tensor: fp32, fp64, fp16, bf16 (accumulated in fp32, rounded once), uint8, int8, int16, int32 or int64.
            op: sum, avg, min, max, prod; avg divides by the number of contributors and takes floating point only.
            inplace: write the result to `tensor`; else `Outcome.result` is a new tensor (no copy is made for it).
            out: write the result there instead.
            async_op: return at once.
            how: see the module; algorithm: auto, ring, bidirectional or doubling. And, for sum and avg:
                codec: "int8", "int4" or "bf16" on the wire, for fewer bytes and an error (`collectives.quantize`);
                rounding: with a codec, "nearest" or "stochastic"; feedback: a residual of `ErrorFeedback`.
                reproducible: the result follows from the multiset of contributions, not from who makes them or how
                many members there are (`collectives.reproducible`); contributions: with it, this member's, each by
                itself, none to many, like `tensor`, which then only takes the result; avg divides by their number.

        """
        common = self._common(how, HowToReduce.__optional_keys__)
        return self._start(encoded.all_reduce(tensor=tensor, op=op, inplace=inplace, out=out, **common), async_op)

    @overload
    def reduce_scatter(
        self, tensor: Tensor, op: str = ..., *, async_op: Literal[False] = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def reduce_scatter(self, tensor: Tensor, op: str = ..., *, async_op: Literal[True], **how: Unpack[How]) -> Work: ...
    def reduce_scatter(
        self, tensor: Tensor, op: str = "sum", *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Reduce over all members and scatter: rank r gets rows r*k to (r+1)*k, k = shape[0] / size, as a new tensor.

        A loss before it is complete is `MemberLost` on every survivor: the shares depend on the membership.
        """
        return self._start(ReduceScatter(tensor=tensor, op=op, **self._common(how)), async_op)

    @overload
    def all_gather(
        self, tensor: Tensor, *, out: Tensor | None = ..., async_op: Literal[False] = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def all_gather(
        self, tensor: Tensor, *, out: Tensor | None = ..., async_op: Literal[True], **how: Unpack[How]
    ) -> Work: ...
    def all_gather(
        self, tensor: Tensor, *, out: Tensor | None = None, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Gather one tensor of equal shape from each member as (contributors, *shape), rows in rank order.

        With `out` of that shape the result goes there, and a loss is `MemberLost`; else the rows are the survivors'.
        """
        return self._start(AllGather(tensor=tensor, out=out, **self._common(how)), async_op)

    @overload
    def broadcast(
        self, tensor: Tensor, root: int, *, async_op: Literal[False] = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def broadcast(self, tensor: Tensor, root: int, *, async_op: Literal[True], **how: Unpack[How]) -> Work: ...
    def broadcast(self, tensor: Tensor, root: int, *, async_op: bool = False, **how: Unpack[How]) -> Outcome | Work:
        """Copy the tensor of member `root` (an id, not a rank) to every member, in place.

        If the root is lost before it is complete, every survivor gets `MemberLost`.
        """
        return self._start(Broadcast(tensor=tensor, root=root, **self._common(how)), async_op)

    @overload
    def barrier(self, *, async_op: Literal[False] = ..., **how: Unpack[How]) -> Outcome: ...
    @overload
    def barrier(self, *, async_op: Literal[True], **how: Unpack[How]) -> Work: ...
    def barrier(self, *, async_op: bool = False, **how: Unpack[How]) -> Outcome | Work:
        """Return when every member has entered."""
        return self._start(Barrier(tensor=torch.empty(0), **self._common(how)), async_op)

    @overload
    def run(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = ...,
        kernels: Mapping[str, Callable[[Tensor], object]] | None = ...,
        async_op: Literal[False] = ...,
        **how: Unpack[How],
    ) -> Outcome: ...
    @overload
    def run(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = ...,
        kernels: Mapping[str, Callable[[Tensor], object]] | None = ...,
        async_op: Literal[True],
        **how: Unpack[How],
    ) -> Work: ...
    def run(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = "sum",
        kernels: Mapping[str, Callable[[Tensor], object]] | None = None,
        async_op: bool = False,
        **how: Unpack[How],
    ) -> Outcome | Work:
        """Run any schedule for this world on a flat contiguous buffer of `schedule.count` elements, in place.

        A loss before it is complete is `MemberLost` on every survivor, with the buffer untouched.
        """
        operation = Exchange(tensor=tensor, schedule=schedule, op=op, kernels=kernels or {}, **self._common(how))
        return self._start(operation, async_op)

    def _common(self, how: How, known: frozenset[str] = How.__optional_keys__) -> dict[str, Any]:
        """Fill in the defaults and what the caller sees now. Raises `TypeError` on an unknown keyword."""
        if unknown := sorted(how.keys() - known):
            raise TypeError(f"unknown keyword {unknown[0]!r}; there are {', '.join(sorted(known))}")
        lane = how.get("lane", MAIN)
        return {
            **how,
            "lane": lane,
            "on_loss": how.get("on_loss", "retry"),
            "algorithm": how.get("algorithm", "auto"),
            "snapshot": how.get("snapshot", False),
            "view": self._view(lane),
        }
