"""Collectives of many tensors in few operations: the tensors are packed into buckets of one dtype."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from collectives.errors import UsageError
from collectives.operations.base import Call
from collectives.operations.composite import Composite, Execute, as_one, summary
from collectives.operations.gathers import AllGather
from collectives.operations.reductions import AllReduce, ReduceScatter, check_reduction
from collectives.operations.tensors import check_rows, check_tensor, flat
from collectives.outcome import Outcome
from collectives.staging import copy_out

BUCKET_BYTES = 25 * 2**20
"""Default size of a bucket, bytes; a tensor that is larger has one to itself."""
ALIGNMENT = 16
"""Bytes at whose multiples a tensor begins among others of any dtype."""


@dataclass(slots=True, kw_only=True)
class Coalesced(Composite):
    """A call about a list of tensors; all members give as many, of equal shapes and dtypes."""

    tensors: Sequence[Tensor]
    inputs: Sequence[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        Call.__post_init__(self)
        self.tensors = tuple(self.tensors)
        if not self.tensors:
            raise UsageError(f"{self.kind} takes at least one tensor")
        for tensor in self.tensors:
            check_tensor(self.kind, tensor)
            self.check(tensor)
        detached = [tensor.detach() for tensor in self.tensors]
        self.inputs = [tensor.clone() for tensor in detached] if self.snapshot else detached

    @property
    def reads(self) -> Sequence[Tensor]:
        """All of them, unless there is a snapshot."""
        return () if self.snapshot else self.tensors

    def check(self, tensor: Tensor) -> None:
        """Raise `UsageError` for a tensor that cannot be."""


@dataclass(slots=True, kw_only=True)
class BucketReduce(AllReduce):
    """One bucket."""

    kind: ClassVar[str] = "all_reduce_coalesced"


@dataclass(slots=True, kw_only=True)
class AllReduceCoalesced(Coalesced):
    """All-reduce of a list, in place and all or nothing.

    One operation a bucket. Nothing is written before the last of them is complete, and then only if all had the same
    contributors: buckets that a lost member had still contributed to are run again, from inputs that are untouched.
    """

    kind: ClassVar[str] = "all_reduce_coalesced"
    collective: ClassVar[str] = "all_reduce"
    op: str
    bucket_bytes: int = BUCKET_BYTES

    def check(self, tensor: Tensor) -> None:
        """It must be one that can be reduced."""
        check_reduction(self.kind, tensor.dtype, self.op)
        if self.bucket_bytes < 1:
            raise UsageError(f"{self.kind}: bucket_bytes must be positive, not {self.bucket_bytes}")

    @property
    def writes(self) -> Sequence[Tensor]:
        """All of them."""
        return self.tensors

    def run(self, execute: Execute) -> Outcome:
        """Reduce bucket by bucket; deliver at the end."""
        buckets = in_buckets(self.inputs, self.bucket_bytes)
        outcomes: list[Outcome] = []
        done: dict[int, Outcome] = {}
        stale = list(range(len(buckets)))
        while stale:
            for number in stale:
                done[number] = execute(self._reduction(buckets[number]))
                outcomes.append(done[number])
            stale = [n for n, outcome in done.items() if outcome.contributors != outcomes[-1].contributors]
        for number, bucket in enumerate(buckets):
            self._unpack(done[number], bucket)
        return as_one(outcomes, result=None, results=tuple(self.tensors))

    def _reduction(self, bucket: list[int]) -> BucketReduce:
        inputs = [self.inputs[number] for number in bucket]
        packed = flat(inputs[0]) if len(inputs) == 1 else torch.cat([tensor.reshape(-1) for tensor in inputs])
        return BucketReduce(tensor=packed, op=self.op, inplace=False, contents=summary(inputs), **self.how())

    def _unpack(self, outcome: Outcome, bucket: list[int]) -> None:
        assert outcome.result is not None, "an all-reduce has a result"
        targets = [self.tensors[number] for number in bucket]
        for target, part in zip(targets, torch.split(outcome.result, [t.numel() for t in targets]), strict=True):
            copy_out(part, target)


@dataclass(slots=True, kw_only=True)
class BytesGather(AllGather):
    """All tensors of a list, as bytes."""

    kind: ClassVar[str] = "all_gather_coalesced"


@dataclass(slots=True, kw_only=True)
class AllGatherCoalesced(Coalesced):
    """All-gather of a list, in one operation: for each tensor a new one of shape (contributors, *shape)."""

    kind: ClassVar[str] = "all_gather_coalesced"
    collective: ClassVar[str] = "all_gather"

    def run(self, execute: Execute) -> Outcome:
        """Gather their bytes side by side, whatever their dtypes."""
        starts = list(accumulate((-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in self.inputs), initial=0))
        packed = torch.zeros(starts[-1], dtype=torch.uint8)
        for tensor, start in zip(self.inputs, starts, strict=False):
            packed[start : start + tensor.nbytes] = flat(tensor).view(torch.uint8)
        outcome = execute(BytesGather(tensor=packed, contents=summary(self.inputs), **self.how()))
        assert outcome.result is not None, "an all-gather has a result"
        results = []
        for tensor, start in zip(self.inputs, starts, strict=False):
            rows = outcome.result[:, start : start + tensor.nbytes].contiguous()
            results.append(rows.view(-1).view(tensor.dtype).view(len(rows), *tensor.shape))
        return as_one([outcome], result=None, results=tuple(results))


@dataclass(slots=True, kw_only=True)
class BucketScatter(ReduceScatter):
    """The tensors of one dtype."""

    kind: ClassVar[str] = "reduce_scatter_coalesced"


@dataclass(slots=True, kw_only=True)
class ReduceScatterCoalesced(Coalesced):
    """Reduce-scatter of a list, one operation a dtype: for each tensor a new one of the rows of this rank."""

    kind: ClassVar[str] = "reduce_scatter_coalesced"
    collective: ClassVar[str] = "reduce_scatter"
    op: str

    def check(self, tensor: Tensor) -> None:
        """It must be one that can be reduced and cut."""
        check_reduction(self.kind, tensor.dtype, self.op)
        check_rows(self.kind, tensor, self.view.size)

    def run(self, execute: Execute) -> Outcome:
        """Reduce the parts of each rank side by side."""
        size, results, outcomes = self.view.size, list(self.inputs), list[Outcome]()
        for bucket in in_buckets(self.inputs):
            parts = [self.inputs[number].reshape(size, -1) for number in bucket]
            contents = summary([self.inputs[number] for number in bucket])
            packed = torch.cat(parts, dim=1)
            outcomes.append(execute(BucketScatter(tensor=packed, op=self.op, contents=contents, **self.how())))
            result = outcomes[-1].result
            assert result is not None, "a reduce-scatter has a result"
            for number, part in zip(bucket, torch.split(result.view(-1), [p.shape[1] for p in parts]), strict=True):
                shape = self.inputs[number].shape
                results[number] = part.view(shape[0] // size, *shape[1:])
        return as_one(outcomes, result=None, results=tuple(results))


def in_buckets(tensors: Sequence[Tensor], limit: int | None = None) -> list[list[int]]:
    """Numbers of the tensors that go together: of one dtype, and of up to `limit` bytes if there are several."""
    buckets: list[list[int]] = []
    filling: dict[torch.dtype, tuple[list[int], int]] = {}
    for number, tensor in enumerate(tensors):
        bucket, filled = filling.get(tensor.dtype, ([], 0))
        if not bucket or (limit is not None and filled + tensor.nbytes > limit):
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(number)
        filling[tensor.dtype] = bucket, filled + tensor.nbytes
    return buckets
