"""Collectives of many tensors, and of sparse ones, as methods."""

from collections.abc import Sequence
from typing import Unpack, overload

from torch import Tensor

from collectives.calls.base import Blocking, Caller, How, Queued
from collectives.operations import AllGatherCoalesced, AllReduceCoalesced, AllReduceSparse, ReduceScatterCoalesced
from collectives.operations.coalesced import BUCKET_BYTES
from collectives.outcome import Outcome, Work


class Batches(Caller):
    """Coalesced and sparse collectives."""

    @overload
    def all_reduce_coalesced(
        self,
        tensors: Sequence[Tensor],
        op: str = ...,
        *,
        bucket_bytes: int = ...,
        async_op: Blocking = ...,
        **how: Unpack[How],
    ) -> Outcome: ...
    @overload
    def all_reduce_coalesced(
        self, tensors: Sequence[Tensor], op: str = ..., *, bucket_bytes: int = ..., async_op: Queued, **how: Unpack[How]
    ) -> Work: ...
    def all_reduce_coalesced(
        self,
        tensors: Sequence[Tensor],
        op: str = "sum",
        *,
        bucket_bytes: int = BUCKET_BYTES,
        async_op: bool = False,
        **how: Unpack[How],
    ) -> Outcome | Work:
        """Reduce each of these tensors over all members, in place, in buckets of one dtype and up to `bucket_bytes`.

        All or nothing: the tensors are written when every bucket is complete, and all buckets have the same
        contributors. If a member is lost between them, the survivors run those again that it had contributed to, from
        untouched inputs. `Outcome.results` are the tensors. It takes as much memory as they do until then.
        """
        call = AllReduceCoalesced(tensors=tensors, op=op, bucket_bytes=bucket_bytes, **self._common(how))
        return self._issue(call, async_op)

    @overload
    def all_gather_coalesced(
        self, tensors: Sequence[Tensor], *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def all_gather_coalesced(self, tensors: Sequence[Tensor], *, async_op: Queued, **how: Unpack[How]) -> Work: ...
    def all_gather_coalesced(
        self, tensors: Sequence[Tensor], *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Gather each of these tensors from all members, in one operation, as (contributors, *shape) each.

        `Outcome.results` has them. The rows are the survivors' if a member is lost.
        """
        return self._issue(AllGatherCoalesced(tensors=tensors, **self._common(how)), async_op)

    @overload
    def reduce_scatter_coalesced(
        self, tensors: Sequence[Tensor], op: str = ..., *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def reduce_scatter_coalesced(
        self, tensors: Sequence[Tensor], op: str = ..., *, async_op: Queued, **how: Unpack[How]
    ) -> Work: ...
    def reduce_scatter_coalesced(
        self, tensors: Sequence[Tensor], op: str = "sum", *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Reduce and scatter each of these tensors, in one operation a dtype.

        `Outcome.results` are this rank's rows of each; as `reduce_scatter` otherwise.
        """
        return self._issue(ReduceScatterCoalesced(tensors=tensors, op=op, **self._common(how)), async_op)

    @overload
    def all_reduce_sparse(
        self, given: Tensor | tuple[Tensor, Tensor], op: str = ..., *, async_op: Blocking = ..., **how: Unpack[How]
    ) -> Outcome: ...
    @overload
    def all_reduce_sparse(
        self, given: Tensor | tuple[Tensor, Tensor], op: str = ..., *, async_op: Queued, **how: Unpack[How]
    ) -> Work: ...
    def all_reduce_sparse(
        self, given: Tensor | tuple[Tensor, Tensor], op: str = "sum", *, async_op: bool = False, **how: Unpack[How]
    ) -> Outcome | Work:
        """Add up sparse contributions of all members; every member gets the same entries in order of indices.

        Args:
            given: a sparse COO tensor, of equal shape on all members; or indices (nnz,) int64 and values (nnz, ...).
                Members may have any number of entries. It is not needed any more when the call returns, even with
                `async_op`.
            op: sum, or avg, which divides by the number of contributors.
            async_op: return at once.
            how: see the package; survivors of a loss run it again.

        Returns:
            `Outcome.result` is a new coalesced sparse tensor; of a pair, `Outcome.results` are new indices and values.

        """
        return self._issue(AllReduceSparse(given=given, op=op, **self._common(how)), async_op)
