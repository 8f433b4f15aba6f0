"""Pairwise exchange: an all-to-all in which each rank deals with one other rank at a time.

In step `t` rank `r` exchanges blocks with rank `r xor (t + 1)` where the world is a power of two; else it sends to rank
`r + t + 1` and receives from `r - t - 1`. Each block travels once, and no rank is sent to by two at a time, for any
size of world (Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA
19, 2005). The choice for large blocks.

Schedules are remembered: the same arguments give the same object.
"""

import numpy as np

from collectives.algorithms.parts import Span, blocks_of, column_of, row_of
from collectives.algorithms.strand import Strand, remembered, schedule
from collectives.region import Ints
from collectives.schedule import Schedule


@remembered
def all_to_all(world: int, count: int, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `s` begins with row `s` of `world * world` blocks, rank `d` ends with column `d`.

    `world - 1` steps of one block. The blocks are equal, or have the lengths `counts`.
    """
    blocks = blocks_of(count, world, counts)
    paired = world & (world - 1) == 0

    def target(turn: Ints, rank: Ints) -> Ints:
        return np.bitwise_xor(rank, turn + 1) if paired else (rank + turn + 1) % world

    def source(turn: Ints, rank: Ints) -> Ints:
        return np.bitwise_xor(rank, turn + 1) if paired else (rank - turn - 1) % world

    def span(turn: Ints, rank: Ints) -> Span:
        return blocks(rank * world + target(turn, rank))

    strands = (Strand(range(world - 1), target, source, span),)
    held, wanted = row_of(blocks, world), column_of(blocks, world)
    return schedule("all_to_all", "pairwise", world, count, strands, held=held, wanted=wanted)
