"""Which rows of a sequence each rank has, and which of them attend to which: balance and masks as plain values.

Called by `layout` (what travels where), `local` (what to compute) and by users, to cut their tensors (`shard`).

A rank's rows are a list of runs: rows that follow each other locally, at equal distances in the sequence, within one
document. Whether queries attend to keys is a matter of runs alone, so no mask is ever made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from collectives.errors import UsageError
from collectives.region import split

NAMES = ("contiguous", "zigzag", "striped")


class Run(NamedTuple):
    """Local rows `[start, start + length)`: the rows `position + stride * i` of a document."""

    start: int
    length: int
    position: int
    stride: int
    document: int


class Tile(NamedTuple):
    """Query rows `[q0, q1)` attend to key rows `[k0, k1)`: all, or if `causal` row `i` to the first `i + 1` of them."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool

    @property
    def scores(self) -> int:
        """How many pairs of a query and a key there are."""
        rows, columns = self.q1 - self.q0, self.k1 - self.k0
        if not self.causal:
            return rows * columns
        full = max(0, rows - columns)
        part = rows - full
        return full * columns + part * (part + 1) // 2


class Share(NamedTuple):
    """What one rank has: its runs in order, and where its strata end (parts that others need to different extents)."""

    runs: tuple[Run, ...]
    strata: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.strata[-1]


@dataclass(frozen=True, slots=True)
class Balance:
    """How a sequence is spread over ranks.

    Attributes:
        name: "contiguous": a piece each, as even as can be. "zigzag": two pieces of 2N, the r-th from the front and the
            r-th from the end, so that causal attention is the same work for all. "striped": every N-th row.
        documents: lengths of documents that are packed in the sequence (differences of `cu_seqlens`); each is spread by
            itself, and rows attend within their document only. Empty: the sequence is one.

    """

    name: str = "contiguous"
    documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UsageError(f"balance must be one of {', '.join(NAMES)}, not {self.name!r}")
        if any(length < 0 for length in self.documents):
            raise UsageError("cu_seqlens must not decrease")

    @classmethod
    def packed(cls, cu_seqlens: Sequence[int] | Tensor, name: str = "zigzag") -> "Balance":
        """Documents by where they begin and end, as varlen attention has them: 0, then the end of each.

        Raises:
            UsageError: it does not begin with 0, or decreases.

        """
        ends = [int(end) for end in cu_seqlens]
        if not ends or ends[0] != 0:
            raise UsageError("cu_seqlens must begin with 0 and end with the length of the sequence")
        return cls(name, tuple(stop - start for start, stop in pairwise(ends)))

    def shares(self, length: int, world: int) -> tuple[Share, ...]:
        """What each rank has of a sequence of so many rows.

        Raises:
            UsageError: the documents have another length together.

        """
        if self.documents and sum(self.documents) != length:
            raise UsageError(f"the documents have {sum(self.documents)} rows together, and the sequence {length}")
        return _shares(self, length, world)

    def indices(self, length: int, world: int, rank: int) -> Tensor:
        """The rows of the sequence that a rank has, in its local order; int64."""
        starts = _starts(self.documents or (length,))
        rows = [
            torch.arange(run.length) * run.stride + run.position + starts[run.document]
            for run in self.shares(length, world)[rank].runs
        ]
        return torch.cat([*rows, torch.empty(0, dtype=torch.int64)]).to(torch.int64)


def shard(whole: Tensor, balance: Balance, world: int, rank: int, dim: int = 2) -> Tensor:
    """The rows along `dim` of `whole` that a rank has, contiguous; differentiable."""
    return whole.index_select(dim, balance.indices(whole.shape[dim], world, rank))


def unshard(shards: Sequence[Tensor], balance: Balance, dim: int = 2) -> Tensor:
    """The whole of all ranks' shards, in the order of ranks."""
    joined = torch.cat(list(shards), dim)
    length = joined.shape[dim]
    order = torch.cat([balance.indices(length, len(shards), rank) for rank in range(len(shards))])
    return torch.empty_like(joined).index_copy_(dim, order, joined)


def tiles(queries: Share, q0: int, q1: int, keys: Share, k0: int, k1: int, causal: bool) -> Iterator[Tile]:
    """What rows `[q0, q1)` of one share compute with rows `[k0, k1)` of another; rows count from `q0` and `k0`.

    Tiles of the same queries come one behind the other.
    """
    for query in _clipped(queries, q0, q1):
        waiting: Tile | None = None
        for key in _clipped(keys, k0, k1):
            if query.document != key.document:
                continue
            for tile in _pair(query, key, causal):
                if waiting is not None and _joins(waiting, tile):
                    waiting = waiting._replace(k1=tile.k1)
                    continue
                if waiting is not None:
                    yield waiting
                waiting = tile
        if waiting is not None:
            yield waiting


def _pair(query: Run, key: Run, causal: bool) -> Iterator[Tile]:
    """Rows of two runs of one document."""
    q0, q1, k0, k1 = query.start, query.start + query.length, key.start, key.start + key.length
    if not causal:
        yield Tile(q0, q1, k0, k1, False)
        return
    if query.stride != key.stride:  # a few queries of a decoding step against striped keys: row by row
        for row in range(query.length):
            seen = (query.position + row * query.stride - key.position) // key.stride + 1
            if seen > 0:
                yield Tile(q0 + row, q0 + row + 1, k0, k0 + min(seen, key.length), False)
        return
    offset = -((query.position - key.position) // query.stride)  # row i sees key j where i - j >= offset
    if offset >= query.length:
        return
    q0 += max(0, offset)
    seen = max(0, -offset)  # so many keys are before the first of these queries
    if seen >= key.length - 1:
        yield Tile(q0, q1, k0, k1, False)
        return
    if seen:
        yield Tile(q0, q1, k0, k0 + seen, False)
    yield Tile(q0, q1, k0 + seen, min(k1, k0 + seen + q1 - q0), True)


def _joins(before: Tile, after: Tile) -> bool:
    return not before.causal and not after.causal and before[:2] == after[:2] and before.k1 == after.k0


def _clipped(share: Share, start: int, stop: int) -> Iterator[Run]:
    for run in share.runs:
        low, high = max(run.start, start), min(run.start + run.length, stop)
        if low < high:
            position = run.position + (low - run.start) * run.stride
            yield Run(low - start, high - low, position, run.stride, run.document)


@lru_cache(maxsize=256)
def _shares(balance: Balance, length: int, world: int) -> tuple[Share, ...]:
    found = []
    for rank in range(world):
        runs: list[Run] = []
        ends: list[int] = []
        for stratum in range(2 if balance.name == "zigzag" else 1):
            for document, rows in enumerate(balance.documents or (length,)):
                position, count, stride = _part(balance.name, rows, world, rank, stratum)
                if count:
                    start = runs[-1].start + runs[-1].length if runs else 0
                    runs.append(Run(start, count, position, stride, document))
            ends.append(runs[-1].start + runs[-1].length if runs else 0)
        found.append(Share(tuple(runs), tuple(ends)))
    return tuple(found)


def _part(name: str, rows: int, world: int, rank: int, stratum: int) -> tuple[int, int, int]:
    """Where a rank's part of a document begins, how many rows it has, and how far they are apart."""
    if name == "striped":
        return rank, len(range(rank, rows, world)), world
    if name == "zigzag":
        start, stop = split(rows, 2 * world)[2 * world - 1 - rank if stratum else rank]
    else:
        start, stop = split(rows, world)[rank]
    return start, stop - start, 1


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts
