"""Recursive doubling: the all-reduce for small messages, in a logarithmic number of steps.

In turn `t` each rank exchanges its whole buffer with the rank whose number differs in bit `t`, and both reduce; after
`log2` turns everybody has everything (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", IJHPCA 19, 2005). Of a world that is no power of two, the ranks beyond the largest power first
fold their buffers into a partner's, stand aside, and get the result at the end.
"""

import numpy as np

from collectives.algorithms.parts import everything
from collectives.algorithms.strand import NOBODY, Strand, finishing, remembered, schedule, whole
from collectives.region import Ints
from collectives.schedule import Schedule


@remembered
def all_reduce(world: int, count: int, finish: bool = False) -> Schedule:
    """Every rank ends with the reduction of all.

    `log2(world)` steps of `count` elements out of and into each rank; with `world` between two powers of two, two
    steps more than for the lower one. With `finish`, every rank runs the elementwise kernel "finish" on the whole
    buffer at the end.

    The bits are equal on all ranks if the reduction is commutative to the bit, as IEEE 754 addition and multiplication
    are: the two ends of an exchange reduce the same two values, one as `a op b` and the other as `b op a`. (Not so
    between NaNs of unlike payload, or a minimum or maximum that returns either of +0 and -0.)

    The same arguments give the same object.
    """
    rounds = max(world, 1).bit_length() - 1
    core = 1 << rounds
    extra = world - core
    first = 1 if extra else 0

    def out(turn: Ints, rank: Ints) -> Ints:
        return np.where(rank >= core, rank - core, NOBODY)

    def back(turn: Ints, rank: Ints) -> Ints:
        return np.where(rank < extra, rank + core, NOBODY)

    def partner(turn: Ints, rank: Ints) -> Ints:
        return np.where(rank < core, rank ^ np.left_shift(1, turn), NOBODY)

    span = whole(count)
    strands = (
        Strand(steps=range(first), target=out, source=back, span=span, combine=True),
        Strand(steps=range(first, first + rounds), target=partner, source=partner, span=span, combine=True),
        Strand(steps=range(first + rounds, 2 * first + rounds), target=back, source=out, span=span),
    )
    end = finishing(finish, 2 * first + rounds, lambda rank: span(rank, rank))
    held = wanted = everything(count)
    return schedule("all_reduce", "doubling", world, count, strands, held=held, wanted=wanted, finishes=end)
