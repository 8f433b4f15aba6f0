"""The dissemination barrier: nobody leaves before everybody has come, in a logarithmic number of steps.

In turn `t` rank `r` notifies rank `r + 2**t`, and goes on when rank `r - 2**t` has notified it. What a rank has heard
of doubles with each turn, for a world of any size (Hensgen, Finkel and Manber, "Two algorithms for barrier
synchronization", IJPP 17, 1988).
"""

import numpy as np

from collectives.algorithms.parts import Span, everything
from collectives.algorithms.strand import Strand, remembered, schedule
from collectives.region import Ints
from collectives.schedule import Schedule


@remembered
def barrier(world: int) -> Schedule:
    """Notifications only: each transfer has an empty range of a buffer of no elements.

    `ceil(log2(world))` steps, in which each rank sends and receives one notification. The same argument gives the
    same object.
    """

    def nothing(turn: Ints, rank: Ints) -> Span:
        return np.zeros_like(rank), np.zeros_like(rank)

    strand = Strand(
        steps=range((max(world, 1) - 1).bit_length()),
        target=lambda turn, rank: (rank + np.left_shift(1, turn)) % world,
        source=lambda turn, rank: (rank - np.left_shift(1, turn)) % world,
        span=nothing,
        notify=True,
    )
    return schedule("barrier", "dissemination", world, 0, (strand,), held=everything(0), wanted=everything(0))
