"""Which chunk goes from whom to whom: a plan in rounds of bounded size, each one a Schedule.

`collectives.sync` calls `plan_rounds` on every member with the same arguments and gets the same plan everywhere: it
follows from gathered data alone.

A chunk leaves one giver once, and goes down a chain of all members that lack it: each hands it on to the next (the
engine does so segment by segment, while more arrives), so that a giver's bytes do not grow with the number of takers.
Chunks are spread over the givers by bytes. One that came corrupt is taken next from a giver from which it did so least
often, by a chain in another order.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from collectives.region import Ranges
from collectives.schedule import Schedule, Step

ROUND_BYTES = 64 << 20
"""Most bytes of a round, and so of the buffer that every member keeps for it."""


@dataclass(frozen=True, slots=True)
class Route:
    """Some chunks that go from one giver to the first taker, and from each taker to the next. All are ranks."""

    giver: int
    takers: tuple[int, ...]
    chunks: tuple[int, ...]
    start: int
    stop: int
    """Where in the round's buffer the chunks lie, in order and without gaps."""


@dataclass(frozen=True, slots=True)
class Round:
    """What moves at once."""

    count: int
    """Bytes of the buffer; every chunk of the round is in it once."""
    routes: tuple[Route, ...]

    @property
    def moved(self) -> int:
        """Bytes that all takers together receive."""
        return sum((route.stop - route.start) * len(route.takers) for route in self.routes)

    def schedule(self, world: int) -> Schedule:
        """The round as a schedule on a buffer of `count` bytes."""
        steps: defaultdict[int, list[tuple[int, int, int, int, bool]]] = defaultdict(list)
        held: list[Ranges] = [()] * world
        wanted: list[Ranges] = [()] * world
        for route in self.routes:
            held[route.giver] += ((route.start, route.stop),)
            for hop, (src, dst) in enumerate(zip((route.giver, *route.takers), route.takers, strict=False)):
                steps[hop].append((src, dst, route.start, route.stop, False))
                wanted[dst] += ((route.start, route.stop),)
        columns = [Step.of(steps[index]) for index in range(len(steps))]
        return Schedule.from_steps("exchange", "chains", world, self.count, columns, held, wanted)


def plan_rounds(
    sizes: Sequence[int],
    lacking: npt.NDArray[np.bool_],
    givers: Sequence[int],
    failures: Mapping[tuple[int, int], int],
    round_bytes: int = ROUND_BYTES,
) -> Iterator[Round]:
    """Rounds that bring every chunk to every rank that lacks it, in the order of chunks.

    Args:
        sizes: bytes of each chunk, none of them 0.
        lacking: shape (world, chunks): whether the rank lacks the chunk.
        givers: ranks that hold every chunk, at least one.
        failures: how often a chunk came corrupt from a giver, by (giver, chunk).
        round_bytes: limit of a round; one chunk may exceed it.

    """
    load = dict.fromkeys(givers, 0)
    routes: defaultdict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    filled = 0
    for chunk in np.flatnonzero(lacking.any(axis=0)).tolist():
        if routes and filled + sizes[chunk] > round_bytes:
            yield _laid_out(routes, sizes)
            routes.clear()
            filled = 0
        giver = min(givers, key=lambda rank: (failures.get((rank, chunk), 0), load[rank], rank))
        takers = np.flatnonzero(lacking[:, chunk]).tolist()
        turn = (givers.index(giver) + sum(failures.get((rank, chunk), 0) for rank in givers)) % len(takers)
        routes[giver, (*takers[turn:], *takers[:turn])].append(chunk)
        load[giver] += sizes[chunk]
        filled += sizes[chunk]
    if routes:
        yield _laid_out(routes, sizes)


def _laid_out(routes: Mapping[tuple[int, tuple[int, ...]], Sequence[int]], sizes: Sequence[int]) -> Round:
    """The round with its routes one after the other in the buffer."""
    placed: list[Route] = []
    start = 0
    for (giver, takers), chunks in routes.items():
        stop = start + sum(sizes[chunk] for chunk in chunks)
        placed.append(Route(giver, takers, tuple(chunks), start, stop))
        start = stop
    return Round(start, tuple(placed))
