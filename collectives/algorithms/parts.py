"""How a work buffer is cut among ranks: rules from the number of a part to its range, for whole arrays at once."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from collectives.errors import UsageError
from collectives.region import Ints, Ranges, chunk

Span: TypeAlias = tuple[Ints, Ints]
Parts: TypeAlias = Callable[[Ints], Span]
"""(number of a part) -> start and stop. Unless it says otherwise, parts lie one behind the other."""


def even(count: int, parts: int) -> Parts:
    """The parts of `split(count, parts)`."""
    return lambda index: chunk(count, parts, index)


def parts_of(count: int, world: int, counts: Sequence[int] | None) -> Parts:
    """One part a rank: `split(count, world)`, or parts of these lengths.

    Raises:
        UsageError: `counts` does not have one length a rank, none negative, that add up to `count`.

    """
    return even(count, world) if counts is None else _uneven(count, world, counts)


def blocks_of(count: int, world: int, counts: Sequence[int] | None) -> Parts:
    """One block for each source and destination, block `source * world + destination`: equal, or of these lengths.

    Raises:
        UsageError: `counts` does not have `world * world` lengths, none negative, that add up to `count`; or there is
            none and `count` cannot be cut in `world * world` equal blocks.

    """
    if counts is not None:
        return _uneven(count, world * world, counts)
    if count % (world * world):
        raise UsageError(f"{count} elements are not {world} x {world} equal blocks; give counts, one a block")
    return even(count, world * world)


def within(start: int, stop: int, parts: int) -> Parts:
    """The range [start, stop) cut like `split`."""

    def inside(index: Ints) -> Span:
        low, high = chunk(stop - start, parts, index)
        return start + low, start + high

    return inside


def part_if(parts: Parts, index: Ints) -> Span:
    """The parts with these numbers, empty where a number is negative: where there is none."""
    start, stop = parts(np.maximum(index, 0))
    return start, np.where(index < 0, start, stop)


def arc(parts: Parts, world: int, first: Ints, length: Ints, turn: Ints) -> Span:
    """Of `length` parts in a row from `first` on, which come round at `world`: those before the end, or behind it.

    Even turns give the range before the end, odd ones the range behind it. Either may be empty.
    """
    end = first + length
    ahead = turn % 2 == 0
    low, high = np.where(ahead, first, 0), np.where(ahead, np.minimum(end, world), end - world)
    filled = low < high
    start = parts(np.where(filled, low, 0))[0]
    stop = parts(np.where(filled, high - 1, 0))[1]
    return start, np.where(filled, stop, start)


def everything(count: int) -> Callable[[int], Ranges]:
    """The whole buffer, on every rank."""
    return lambda rank: ((0, count),)


def only(root: int, count: int) -> Callable[[int], Ranges]:
    """The whole buffer on the root, nothing on other ranks."""
    return lambda rank: ((0, count),) if rank == root else ()


def own(parts: Parts) -> Callable[[int], Ranges]:
    """Part `r`, on rank `r`."""

    def mine(rank: int) -> Ranges:
        start, stop = parts(np.array([rank]))
        return ((int(start[0]), int(stop[0])),)

    return mine


def row_of(blocks: Parts, world: int) -> Callable[[int], Ranges]:
    """All blocks of which a rank is the source."""

    def row(rank: int) -> Ranges:
        start, stop = blocks(np.array([rank * world, rank * world + world - 1]))
        return ((int(start[0]), int(stop[1])),)

    return row


def column_of(blocks: Parts, world: int) -> Callable[[int], Ranges]:
    """All blocks of which a rank is the destination."""

    def column(rank: int) -> Ranges:
        start, stop = blocks(np.arange(world) * world + rank)
        return tuple(zip(start.tolist(), stop.tolist(), strict=True))

    return column


def checked_root(kind: str, root: int, world: int) -> int:
    """Return `root`.

    Raises:
        UsageError: it is not a rank.

    """
    if not 0 <= root < world:
        raise UsageError(f"{kind} with root {root}: not a rank of a world of {world}")
    return root


def _uneven(count: int, parts: int, counts: Sequence[int]) -> Parts:
    if len(counts) != parts or min(counts, default=0) < 0 or sum(counts) != count:
        raise UsageError(
            f"counts must be {parts} lengths that add up to {count}; these are {len(counts)}, "
            f"the least {min(counts, default=0)}, and add up to {sum(counts)}"
        )
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
    return lambda index: (bounds[index], bounds[index + 1])
