"""The collectives that move data without reducing them, as methods."""

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack, overload

import torch
from torch import Tensor

from collectives.calls.base import Blocking, Caller, How, Queued
from collectives.operations import (
    AllGather,
    AllGatherV,
    AllToAll,
    AllToAllV,
    Barrier,
    Broadcast,
    Exchange,
    Gather,
    Redistribute,
    Scatter,
)
from collectives.outcome import Outcome, Work
from collectives.schedule import Schedule


class Movements(Caller):
    """Broadcast, gather, scatter, all-gather, all-to-all, barrier, and any schedule."""

    @overload
    def all_gather(
        self, tensor: Tensor, *, out: Tensor | None = ..., async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def all_gather(self, tensor: Tensor, *, out: Tensor | None = ..., async_op: Queued, **how: Unpack[How]) -> Work: ...
    def all_gather(
        self, tensor: Tensor, *, out: Tensor | None = None, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Gather one tensor of equal shape from each member as (contributors, *shape), rows in rank order.

        With `out` of that shape the result goes there, and a loss is `MemberLost`; else the rows are the survivors'.
        """
        return self._issue(AllGather(tensor=tensor, out=out, **self._common(how)), async_op)

    @overload
    def all_gather_v(
        self, tensor: Tensor, counts: Sequence[int] | None = ..., *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def all_gather_v(
        self, tensor: Tensor, counts: Sequence[int] | None = ..., *, async_op: Queued, **how: Unpack[How]
    ) -> Work: ...
    def all_gather_v(
        self, tensor: Tensor, counts: Sequence[int] | None = None, *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Gather tensors that may differ in their first dimension, as one new tensor: all rows, in rank order.

        `Outcome.counts` are the rows of each contributor. `counts`, one number for each rank, saves telling the others
        how many rows each has; it must be the same on all members. The rows are the survivors' if a member is lost.
        """
        return self._issue(AllGatherV(tensor=tensor, counts=counts, **self._common(how)), async_op)

    @overload
    def gather(self, tensor: Tensor, root: int, *, async_op: Blocking = ..., **how: Unpack[How]) -> Outcome: ...
    @overload
    def gather(self, tensor: Tensor, root: int, *, async_op: Queued, **how: Unpack[How]) -> Work: ...
    def gather(self, tensor: Tensor, root: int, *, async_op: bool = False, **how: Unpack[How]) -> Outcome | Work:
        """Gather one tensor of equal shape from each member at member `root`, as a new tensor (contributors, *shape).

        The others get no result. If the root is lost before it is complete, every survivor gets `MemberLost`; if
        another is, the rows are the survivors'.
        """
        return self._issue(Gather(tensor=tensor, root=root, **self._common(how)), async_op)

    @overload
    def scatter(
        self, tensor: Tensor, root: int, rows: Tensor | None = ..., *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def scatter(
        self, tensor: Tensor, root: int, rows: Tensor | None = ..., *, async_op: Queued, **how: Unpack[How]
    ) -> Work: ...
    def scatter(
        self, tensor: Tensor, root: int, rows: Tensor | None = None, *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Write row r of `rows`, which member `root` alone gives, to `tensor` of rank r; returns when all have theirs.

        `tensor` has the same shape and dtype on all members, `rows` is (size, *shape). A loss before it is complete is
        `MemberLost` on every survivor.
        """
        return self._issue(Scatter(tensor=tensor, root=root, rows=rows, **self._common(how)), async_op)

    @overload
    def all_to_all(self, tensor: Tensor, *, async_op: Blocking = ..., **how: Unpack[How]) -> Outcome: ...
    @overload
    def all_to_all(self, tensor: Tensor, *, async_op: Queued, **how: Unpack[How]) -> Work: ...
    def all_to_all(self, tensor: Tensor, *, async_op: bool = False, **how: Unpack[How]) -> Outcome | Work:
        """Send block d of the tensor to rank d; the result has a block from each, in rank order.

        Blocks are equal parts along dim 0; the result is a new tensor of the same shape. A loss before it is complete
        is `MemberLost` on every survivor.
        """
        return self._issue(AllToAll(tensor=tensor, **self._common(how)), async_op)

    @overload
    def all_to_all_v(
        self,
        tensor: Tensor,
        input_counts: Sequence[int],
        output_counts: Sequence[int] | None = ...,
        *,
        async_op: Blocking = ...,
        **how: Unpack[How],
    ) -> Outcome: ...
    @overload
    def all_to_all_v(
        self,
        tensor: Tensor,
        input_counts: Sequence[int],
        output_counts: Sequence[int] | None = ...,
        *,
        async_op: Queued,
        **how: Unpack[How],
    ) -> Work: ...
    def all_to_all_v(
        self,
        tensor: Tensor,
        input_counts: Sequence[int],
        output_counts: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        **how: Unpack[How],
    ) -> Outcome | Work:
        """Send `input_counts[d]` rows of the tensor to rank d, in order; the result has those from each, in rank order.

        The members tell each other their counts first. `Outcome.counts` are the rows that came from each. With
        `output_counts`, what is expected of each, a difference is `DescriptorMismatch` on every member. A loss before
        it is complete is `MemberLost` on every survivor.
        """
        call = AllToAllV(tensor=tensor, inputs=input_counts, outputs=output_counts, **self._common(how))
        return self._issue(call, async_op)

    @overload
    def broadcast(self, tensor: Tensor, root: int, *, async_op: Blocking = ..., **how: Unpack[How]) -> Outcome: ...
    @overload
    def broadcast(self, tensor: Tensor, root: int, *, async_op: Queued, **how: Unpack[How]) -> Work: ...
    def broadcast(self, tensor: Tensor, root: int, *, async_op: bool = False, **how: Unpack[How]) -> Outcome | Work:
        """Copy the tensor of member `root` (an id, not a rank) to every member, in place.

        If the root is lost before it is complete, every survivor gets `MemberLost`.
        """
        return self._issue(Broadcast(tensor=tensor, root=root, **self._common(how)), async_op)

    @overload
    def barrier(self, *, async_op: Blocking = ..., **how: Unpack[How]) -> Outcome: ...
    @overload
    def barrier(self, *, async_op: Queued, **how: Unpack[How]) -> Work: ...
    def barrier(self, *, async_op: bool = False, **how: Unpack[How]) -> Outcome | Work:
        """Return when every member has entered."""
        return self._issue(Barrier(tensor=torch.empty(0), **self._common(how)), async_op)

    @overload
    def run(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = ...,
        kernels: Mapping[str, Callable[[Tensor], object]] | None = ...,
        async_op: Blocking = ...,
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
        async_op: Queued,
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
        call = Exchange(tensor=tensor, given=schedule, op=op, kernels=kernels or {}, **self._common(how))
        return self._issue(call, async_op)

    @overload
    def redistribute(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = ...,
        kernels: Mapping[str, Callable[..., object]] | None = ...,
        async_op: Blocking = ...,
        **how: Unpack[How],
    ) -> Outcome: ...
    @overload
    def redistribute(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = ...,
        kernels: Mapping[str, Callable[..., object]] | None = ...,
        async_op: Queued,
        **how: Unpack[How],
    ) -> Work: ...
    def redistribute(
        self,
        schedule: Schedule,
        tensor: Tensor,
        *,
        op: str = "sum",
        kernels: Mapping[str, Callable[..., object]] | None = None,
        async_op: bool = False,
        **how: Unpack[How],
    ) -> Outcome | Work:
        """Run any schedule for this world on the elements that this rank holds, without a buffer of all of them.

        `tensor` has the elements of `schedule.held(rank)`, in order; the result is a new flat tensor of those of
        `schedule.wanted(rank)`. All ranks give the same dtype, also those that hold nothing. `kernels` are by name
        what the schedule computes with; they may run again for another attempt. A loss before it is complete is
        `MemberLost` on every survivor.
        """
        call = Redistribute(tensor=tensor, given=schedule, op=op, kernels=kernels or {}, **self._common(how))
        return self._issue(call, async_op)
