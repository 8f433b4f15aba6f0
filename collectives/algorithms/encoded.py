"""All-reduce of encoded contributions: exchange, combine, share. For codecs whose sums are no codes of the same kind.

What is moved are records: a tensor is cut into blocks, and a block travels as a record of `up` bytes on its way to the
rank that combines it, and of `down` bytes on the way back. Unlike in a ring nothing is encoded more than twice, and
every contribution reaches the combining rank by itself, so that the order of the sum is the order of ranks. Each rank
sends `(world - 1) / world * blocks * (up + down)` bytes, the least possible, in `world - 1` messages each way (the
scheme of Alistarh et al., "QSGD", NIPS 2017, and of 1-bit Adam's compressed all-reduce, Tang et al., ICML 2021).

The work buffer is bytes. Rank `d` combines the blocks `split(blocks, world)[d]`, in pieces of about `PIECE` bytes so
that exchanging, combining and sharing overlap. A piece is `world` slots, one for the records of each rank, in their
order; the result replaces the front of the combining rank's own slot. A rank's slots in the order of the buffer are its
records in the order of blocks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from collectives.algorithms.strand import remembered
from collectives.region import Ints, Range, Ranges, split
from collectives.schedule import Computes, Schedule, Step, column

PIECE = 2**19
"""Bytes of a slot, about: smaller ones pay more for messages, larger ones leave less to overlap."""


class Piece(NamedTuple):
    """A run of blocks `[first, last)` that `rank` combines; slot 0 starts at byte `start` of the work buffer."""

    rank: int
    number: int
    """Among the pieces of this rank."""
    first: int
    last: int
    start: int

    def slot(self, rank: int, up: int) -> Range:
        """Where the records of `rank` are in the work buffer, each of `up` bytes."""
        size = (self.last - self.first) * up
        return self.start + rank * size, self.start + (rank + 1) * size

    def result(self, up: int, down: int) -> Range:
        """Where the combined records are."""
        start, _ = self.slot(self.rank, up)
        return start, start + (self.last - self.first) * down


@functools.lru_cache(maxsize=64)
def pieces(world: int, blocks: int, up: int) -> tuple[Piece, ...]:
    """Cut `blocks` into the pieces of all ranks, in order of blocks and of the work buffer."""
    most = max(1, PIECE // up)
    return tuple(
        Piece(rank, number, low + first, low + last, (low + first) * up * world)
        for rank, (low, high) in enumerate(split(blocks, world))
        for number, (first, last) in enumerate(split(high - low, -(-(high - low) // most)) if high > low else ())
    )


def kernel(number: int) -> str:
    """Name of the kernel that combines the piece of this number: it is given all slots and writes the result."""
    return f"combine {number}"


@remembered
def all_reduce(world: int, blocks: int, up: int, down: int) -> Schedule:
    """Every rank ends with the combined records of all blocks, each piece's at `Piece.result`.

    Three steps. `down <= up`. `verify` proves that every piece is combined from defined slots and that all ranks get
    the same copies; what the kernels compute is up to the caller.
    """
    cut = pieces(world, blocks, up)
    ranks = np.arange(world)
    exchange: list[tuple[Ints, ...]] = []
    share: list[tuple[Ints, ...]] = []
    computes: list[tuple[int, int, int, int, bool]] = []
    for piece in sorted(cut, key=lambda piece: (piece.number, piece.rank)):
        others = np.roll(ranks, -piece.rank)[1:]
        slots = np.array([piece.slot(int(rank), up) for rank in others], dtype=np.int64).reshape(-1, 2)
        home = np.full(world - 1, piece.rank)
        exchange.append((others, home, slots[:, 0], slots[:, 1]))
        start, stop = piece.result(up, down)
        share.append((home, others, np.full(world - 1, start), np.full(world - 1, stop)))
        whole = piece.start, piece.slot(world - 1, up)[1]
        computes.append((piece.rank, piece.number, *whole, False))

    def held(rank: int) -> Ranges:
        return tuple(piece.slot(rank, up) for piece in cut)

    steps = [_copies(exchange), Step.of(computes=computes), _copies(share)]
    return Schedule.from_steps(
        "encoded_all_reduce",
        "encoded",
        world,
        blocks * up * world,
        steps if cut else [],
        [held(rank) for rank in range(world)],
        [tuple(piece.result(up, down) for piece in cut)] * world,
        tuple(kernel(number) for number in range(max((piece.number + 1 for piece in cut), default=0))),
    )


def _copies(rows: Sequence[tuple[Ints, ...]]) -> Step:
    """A step of transfers given as columns, piece by piece."""
    none = (np.zeros(0, dtype=np.int64),) * 4
    src, dst, start, stop = (np.concatenate(columns) for columns in zip(none, *rows, strict=True))
    return Step(
        column(src, np.int32),
        column(dst, np.int32),
        column(start, np.int64),
        column(stop, np.int64),
        column(np.zeros(len(src)), np.bool_),
        Computes.of(),
    )
