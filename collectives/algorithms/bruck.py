"""Bruck's all-to-all: a logarithmic number of steps, in which blocks travel through other ranks; for small blocks.

A block that has to go `d` ranks further moves `2**t` ranks in the step of each bit `t` that is set in `d` (Bruck, Ho,
Kipnis, Upfal and Weathersby, "Efficient algorithms for all-to-all communications in multiport message-passing
systems", IEEE TPDS 8, 1997). It stays at its own place of the work buffer all the way. The highest bit goes first here:
so the blocks of one source that move together lie side by side, and a rank sends about `world` ranges in all, as many
as in a direct exchange, but to `log2(world)` ranks. In exchange it sends every block up to `log2(world)` times.

Schedules are remembered: the same arguments give the same object.
"""

import numpy as np

from collectives.algorithms.parts import Parts, Span, arc, blocks_of, column_of, row_of
from collectives.algorithms.strand import Strand, remembered, schedule
from collectives.region import Ints
from collectives.schedule import Schedule


@remembered
def all_to_all(world: int, count: int, counts: tuple[int, ...] | None = None) -> Schedule:
    """Rank `s` begins with row `s` of `world * world` blocks, rank `d` ends with column `d`.

    `ceil(log2(world))` steps of up to `world / 2` blocks. The blocks are equal, or have the lengths `counts`.
    """
    blocks = blocks_of(count, world, counts)
    rounds = (world - 1).bit_length()
    strands = tuple(_hop(world, blocks, turn, 1 << rounds - 1 - turn) for turn in range(rounds))
    held, wanted = row_of(blocks, world), column_of(blocks, world)
    return schedule("all_to_all", "bruck", world, count, strands, held=held, wanted=wanted)


def _hop(world: int, blocks: Parts, step: int, distance: int) -> Strand:
    """All blocks that have `distance` to go, or up to as much more, go so far.

    Those of higher bits have gone before: a rank has blocks of each source that is a multiple of `2 * distance` behind.
    """
    behind = -(-world // (2 * distance))

    def span(turn: Ints, rank: Ints) -> Span:
        gone = turn // 2 * (2 * distance)
        source = (rank - gone) % world
        going = np.maximum(np.minimum(distance, world - gone - distance), 0)
        return arc(lambda block: blocks(source * world + block), world, (rank + distance) % world, going, turn)

    return Strand(
        steps=range(step, step + 1),
        target=lambda turn, rank: (rank + distance) % world,
        source=lambda turn, rank: (rank - distance) % world,
        span=span,
        turns=2 * behind,
    )
