"""Measures the links between members: the schedule of the probes, and what follows from the times that it takes.

Called by `collectives.arrangement`. Ranks meet in pairs, as many pairs at once as there are, as in a round-robin
tournament: `world - 1` rounds, or `world` of an odd number. In a round the lower rank of a pair measures: PINGS round
trips of one element, then BULKS times a long message out and a short one back, and the reverse. It is an ordinary
schedule, run on an ordinary lane; what is in the buffer does not matter. The ranks read the clock in a kernel that runs
on the whole buffer, so that nothing of the next trip can leave before.
"""

import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from collectives.schedule import Schedule, Step

PINGS = 9
"""Round trips of which the median counts: the fastest may have caught up with one that was late."""
BULKS = 2
"""Long messages in each direction of which the faster counts: the first may meet a connection that is cold."""
_TRIPS = PINGS + 2 * BULKS
_LEAST_SHARE = 0.1
"""Of a trip's time is taken for the long message's at least: the rest is noise."""


class Probe(NamedTuple):
    """What a rank found about its links with `peer`: latency one way in seconds, bytes a second to it and back."""

    peer: int
    latency: float
    out: float
    back: float


def rounds(world: int) -> list[list[tuple[int, int]]]:
    """Who meets whom: every pair once, no rank twice in a round (the circle method)."""
    seats = list(range(world)) + [world] * (world % 2)
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if world not in pair])
        seats[1:] = [seats[-1], *seats[1:-1]]
    return found


def tournament(world: int, count: int) -> Schedule:
    """The probes among `world` ranks, with long messages of `count` elements.

    The buffer's last element is what short messages carry; it comes last in the long ones, too.
    """
    whole, short = (0, count), (count - 1, count)
    steps = []
    for pairs in rounds(world):
        outward, back = [(low, high) for low, high in pairs], [(high, low) for low, high in pairs]
        steps.append(_clocks(outward, count))
        trips = [(short, short)] * PINGS + [(whole, short)] * BULKS + [(short, whole)] * BULKS
        for there, here in trips:
            steps.append(Step.of((src, dst, *there, False) for src, dst in outward))
            if here == whole:
                steps.append(_clocks(back, count))
            steps.append(Step.of((src, dst, *here, False) for src, dst in back))
            steps.append(_clocks(outward, count))
    return Schedule.from_steps(
        "probe", "tournament", world, count, steps, [(whole,)] * world, [()] * world, kernels=("clock",)
    )


def _clocks(pairs: list[tuple[int, int]], count: int) -> Step:
    """Those who send next read the clock first."""
    return Step.of(computes=((src, 0, 0, count, False) for src, _ in pairs))


@dataclass(slots=True)
class Clock:
    """The kernel of one rank, and what it has read."""

    read: list[float] = field(default_factory=list)

    def __call__(self, buffer: Tensor) -> None:
        """Read the clock."""
        self.read.append(time.perf_counter())


def results(world: int, rank: int, nbytes: int, read: list[float]) -> list[Probe]:
    """What the times say that `rank` has read in the last tournament; `nbytes` were those of a long message."""
    mine = [pair for pairs in rounds(world) for pair in pairs if rank in pair]
    readings = [_TRIPS + 1 if rank == low else BULKS for low, _ in mine]
    at = len(read) - sum(readings)  # an attempt that was given up may have left some
    found = []
    for (low, high), number in zip(mine, readings, strict=True):
        if rank == low:
            trips = [after - before for before, after in pairwise(read[at : at + number])]
            trip = statistics.median(trips[:PINGS])
            out, back = min(trips[PINGS : PINGS + BULKS]), min(trips[PINGS + BULKS :])
            rates = [nbytes / max(long - trip, _LEAST_SHARE * long) for long in (out, back)]
            found.append(Probe(high, trip / 2, *rates))
        at += number
    return found
