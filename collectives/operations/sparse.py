"""All-reduce of sparse tensors: everybody gets all entries and adds those of one index in the order of members."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from collectives.errors import UnsupportedTensor, UsageError
from collectives.operations.base import Call
from collectives.operations.composite import Composite, Execute, as_one
from collectives.operations.gathers import GatherRows
from collectives.operations.reductions import accumulator, check_reduction
from collectives.operations.tensors import check_tensor, flat, row_size
from collectives.outcome import Outcome

OPS = ("sum", "avg")
KEY_BYTES = 8


@dataclass(slots=True, kw_only=True)
class GatherEntries(GatherRows):
    """Entries as bytes, a key and its values one behind the other; `contents` says of what."""

    kind: ClassVar[str] = "all_reduce_sparse"


@dataclass(slots=True, kw_only=True)
class AllReduceSparse(Composite):
    """Every member ends with the coalesced sum (or average) of all contributions, in a new tensor, with the same bits.

    `given` is a sparse COO tensor, or a pair: indices (nnz,) int64 and values (nnz, ...). A member may give no entries;
    indices that it repeats are added up by itself, before anything is sent. Half precision is accumulated in single
    precision and rounded once, in either sum.
    """

    kind: ClassVar[str] = "all_reduce_sparse"
    collective: ClassVar[str] = "all_gather"
    given: Tensor | tuple[Tensor, Tensor]
    op: str
    keys: Tensor = field(init=False)
    """Flat indices of this member's entries, each one once, in order."""
    values: Tensor = field(init=False)
    """Theirs, of shape (nnz, ...)."""

    def __post_init__(self) -> None:
        keys, values = self._entries()
        check_reduction(self.kind, values.dtype, self.op, OPS)
        Call.__post_init__(self)
        self.keys, total = _added_up(keys, [values.to(accumulator(values.dtype))])
        self.values = total.to(values.dtype)

    def _entries(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.given, Tensor):
            if self.given.layout != torch.sparse_coo or self.given.device.type != "cpu":
                raise UnsupportedTensor(
                    f"{self.kind} takes a sparse COO tensor on the CPU or a pair (indices, values), not a tensor of "
                    f"layout {self.given.layout} on {self.given.device}"
                )
            return _flat_keys(self.given), self.given.detach()._values()
        indices, values = self.given
        for tensor in (indices, values):
            check_tensor(self.kind, tensor)
        if indices.dtype != torch.int64 or indices.dim() != 1 or not values.dim() or len(indices) != len(values):
            raise UsageError(
                f"{self.kind}: a pair is indices of shape (nnz,), int64, and values of shape (nnz, ...), not "
                f"{list(indices.shape)} {indices.dtype} and {list(values.shape)}"
            )
        return indices.detach(), values.detach()

    def run(self, execute: Execute) -> Outcome:
        """Tell the numbers of entries, gather them, and add up."""
        told, numbers = self.learn(execute, [len(self.keys)], elastic=True)
        rows = {member: row for member, (row,) in told.items()}
        packed = torch.cat([_as_rows(self.keys), _as_rows(self.values)], dim=1)
        gather = execute(GatherEntries(tensor=packed, rows=rows, contents=self._contents(), **self.how()))
        assert gather.result is not None, "a gather has a result"
        keys, values = self._sum(gather.result, [rows[member] for member in gather.contributors])
        outcomes = [numbers, gather]
        if not isinstance(self.given, Tensor):
            return as_one(outcomes, result=None, results=(keys, values))
        return as_one(outcomes, result=self._like_given(self.given, keys, values))

    def _contents(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        if isinstance(self.given, Tensor):
            return f"{self.op} of {dtype}, {self.given.sparse_dim()} sparse of {list(self.given.shape)}"
        return f"{self.op} of {dtype} {list(self.values.shape[1:])} by index"

    def _sum(self, entries: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All keys, in order, and the sums of their values."""
        keys = entries[:, :KEY_BYTES].contiguous().view(torch.int64).view(-1)
        values = entries[:, KEY_BYTES:].contiguous().view(-1).view(self.values.dtype)
        parts = torch.split(values.view(len(entries), *self.values.shape[1:]), list(rows))
        keys, total = _added_up(keys, [part.to(accumulator(part.dtype)) for part in parts])
        if self.op == "avg":
            total /= len(rows)
        return keys, total.to(self.values.dtype)

    def _like_given(self, given: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shape = given.shape[: given.sparse_dim()]
        indices = (
            torch.stack(torch.unravel_index(keys, shape)) if shape else torch.empty(0, len(keys), dtype=torch.int64)
        )
        return torch.sparse_coo_tensor(indices, values, given.shape, is_coalesced=True, check_invariants=False)


def _flat_keys(given: Tensor) -> Tensor:
    """The index of each entry of a sparse tensor in a row-major tensor of its sparse dimensions."""
    keys = torch.zeros(given._nnz(), dtype=torch.int64)
    shape = given.shape[: given.sparse_dim()]
    if math.prod(shape) > torch.iinfo(torch.int64).max:
        raise UnsupportedTensor(f"all_reduce_sparse: the sparse dimensions {list(shape)} have more than 2**63 indices")
    for extent, index in zip(shape, given.detach()._indices(), strict=True):
        keys = keys * extent + index
    return keys


def _added_up(keys: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Each key once, in order, and the sum of its values, those of the first of `parts` first.

    `index_add_` on the CPU adds in the order of rows for a part with repeated keys; across parts the loop does.
    """
    known, place = torch.unique(keys, sorted=True, return_inverse=True)
    total = torch.zeros(len(known), *parts[0].shape[1:], dtype=parts[0].dtype)
    for part, where in zip(parts, torch.split(place, [len(part) for part in parts]), strict=True):
        total.index_add_(0, where, part)
    return known, total


def _as_rows(tensor: Tensor) -> Tensor:
    """The bytes of each row, shape (rows, bytes)."""
    return flat(tensor).view(torch.uint8).view(len(tensor), row_size(tensor) * tensor.itemsize)
