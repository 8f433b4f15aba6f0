"""The reductions as methods."""

from collections.abc import Sequence
from typing import Unpack, overload

from torch import Tensor

from collectives.calls.base import Blocking, Caller, How, Queued
from collectives.error_feedback import Residual
from collectives.operations import Reduce, ReduceScatter, ReduceScatterV, numerics
from collectives.outcome import Outcome, Work


class HowToReduce(How, total=False):
    """Keywords that all-reduce takes besides; see `Reductions.all_reduce`."""

    codec: str | None
    rounding: str
    feedback: Residual | None
    reproducible: bool
    contributions: Sequence[Tensor] | None


class Reductions(Caller):
    """All-reduce, reduce, reduce-scatter."""

    @overload
    def all_reduce(
        self,
        tensor: Tensor,
        op: str = ...,
        *,
        inplace: bool = ...,
        out: Tensor | None = ...,
        async_op: Blocking = ...,
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
        async_op: Queued,
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
            how: see the package. And, for sum and avg:
                codec: "int8", "int4" or "bf16" on the wire, for fewer bytes and an error (`collectives.quantize`);
                rounding: with a codec, "nearest" or "stochastic"; feedback: a residual of `ErrorFeedback`.
                reproducible: the result follows from the multiset of contributions, not from who makes them or how
                many members there are (`collectives.reproducible`); contributions: with it, this member's, each by
                itself, none to many, like `tensor`, which then only takes the result; avg divides by their number.

        """
        common = self._common(how, HowToReduce.__optional_keys__)
        return self._issue(numerics.all_reduce(tensor=tensor, op=op, inplace=inplace, out=out, **common), async_op)

    @overload
    def reduce(
        self,
        tensor: Tensor,
        root: int,
        op: str = ...,
        *,
        inplace: bool = ...,
        out: Tensor | None = ...,
        async_op: Blocking = ...,
        **how: Unpack[How],
    ) -> Outcome: ...
    @overload
    def reduce(
        self,
        tensor: Tensor,
        root: int,
        op: str = ...,
        *,
        inplace: bool = ...,
        out: Tensor | None = ...,
        async_op: Queued,
        **how: Unpack[How],
    ) -> Work: ...
    def reduce(
        self,
        tensor: Tensor,
        root: int,
        op: str = "sum",
        *,
        inplace: bool = True,
        out: Tensor | None = None,
        async_op: bool = False,
        **how: Unpack[How],
    ) -> Outcome | Work:
        """Reduce over all members to member `root`, as `all_reduce` does; the others get no result.

        `inplace` and `out` say where the root's result goes; the other members' tensors are left as they are. If the
        root is lost before it is complete, every survivor gets `MemberLost`; if another is, they run it again.
        """
        call = Reduce(tensor=tensor, op=op, root=root, inplace=inplace, out=out, **self._common(how))
        return self._issue(call, async_op)

    @overload
    def reduce_scatter(
        self, tensor: Tensor, op: str = ..., *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def reduce_scatter(self, tensor: Tensor, op: str = ..., *, async_op: Queued, **how: Unpack[How]) -> Work: ...
    def reduce_scatter(
        self, tensor: Tensor, op: str = "sum", *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Reduce over all members and scatter: rank r gets rows r*k to (r+1)*k, k = shape[0] / size, as a new tensor.

        A loss before it is complete is `MemberLost` on every survivor: the shares depend on the membership.
        """
        return self._issue(ReduceScatter(tensor=tensor, op=op, **self._common(how)), async_op)

    @overload
    def reduce_scatter_v(
        self, tensor: Tensor, counts: Sequence[int], op: str = ..., *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def reduce_scatter_v(
        self, tensor: Tensor, counts: Sequence[int], op: str = ..., *, async_op: Queued, **how: Unpack[How]
    ) -> Work: ...
    def reduce_scatter_v(
        self, tensor: Tensor, counts: Sequence[int], op: str = "sum", *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Reduce over all members and scatter unevenly: rank r gets `counts[r]` rows, those behind the ranks before it.

        `counts` has a number for each rank, zeros allowed, the same on all members; they add up to shape[0]. A loss
        before it is complete is `MemberLost` on every survivor.
        """
        call = ReduceScatterV(tensor=tensor, row_counts=counts, op=op, **self._common(how))
        return self._issue(call, async_op)
