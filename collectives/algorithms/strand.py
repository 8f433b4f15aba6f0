"""Strands: rules from which the steps of a schedule are produced on demand, for all ranks or for one.

The algorithms of this folder are written as strands. A strand is a movement in which each rank sends to at most one
rank and receives from at most one rank in a step; the rules give peers and ranges for whole arrays of turns and ranks
at once. So a step of 4096 ranks is a handful of array operations, and so is one rank's part of 8190 steps.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from collectives.region import Ints, Ranges, chunk
from collectives.schedule import Bools, Computes, Recv, Schedule, Send, Step, column

P = ParamSpec("P")
Span: TypeAlias = tuple[Ints, Ints]
NOBODY = -1
"""What a peer rule returns for a rank that stands still in that turn."""


@dataclass(frozen=True, slots=True)
class Strand:
    """At most one transfer a rank and step, over consecutive steps; `turn` counts these from 0.

    All rules take an array of turns and one of ranks, of equal length, and return arrays of that length.
    `source` is the inverse of `target`: `target(t, s) == r` if and only if `source(t, r) == s`.
    """

    steps: range
    target: Callable[[Ints, Ints], Ints]
    """(turn, rank) -> the rank that it sends to, or NOBODY."""
    source: Callable[[Ints, Ints], Ints]
    """(turn, rank) -> the rank that it receives from, or NOBODY."""
    span: Callable[[Ints, Ints], Span]
    """(turn, sending rank) -> start and stop. Empty ranges are not sent, unless the strand notifies."""
    combine: bool = False
    notify: bool = False

    def moving(self, peer: Ints, start: Ints, stop: Ints) -> Bools:
        """Which rows are transfers."""
        going: Bools = peer != NOBODY
        return going if self.notify else going & (start < stop)


@dataclass(frozen=True, slots=True)
class Finish:
    """The elementwise kernel "finish" on a range of every rank, in one step."""

    step: int
    span: Callable[[Ints], Span]
    """(rank) -> start and stop; nothing is computed where this is empty."""


@dataclass(frozen=True, slots=True)
class Strands:
    """A program (`collectives.schedule.Program`) of strands and perhaps a finish."""

    world: int
    strands: tuple[Strand, ...]
    finish: Finish | None = None

    def __len__(self) -> int:
        ends = [strand.steps.stop for strand in self.strands]
        return max([*ends, self.finish.step + 1] if self.finish else ends, default=0)

    def step(self, index: int) -> Step:
        """All rows of a step: strand by strand, and in the order of sending ranks."""
        ranks = np.arange(self.world)
        parts = [_NO_ROWS]
        for strand in self.strands:
            if index in strand.steps:
                turns = np.full(self.world, index - strand.steps.start)
                target = strand.target(turns, ranks)
                start, stop = strand.span(turns, ranks)
                moving = strand.moving(target, start, stop)
                combine = np.full(self.world, strand.combine)
                parts.append(tuple(values[moving] for values in (ranks, target, start, stop, combine)))
        src, dst, start, stop, combine = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return Step(
            column(src, np.int32),
            column(dst, np.int32),
            column(start, np.int64),
            column(stop, np.int64),
            column(combine, np.bool_),
            self._finished(index, ranks),
        )

    def sends(self, rank: int) -> Iterator[tuple[int, Send]]:
        """What the rank sends."""
        for strand in self.strands:
            turns, ranks = np.arange(len(strand.steps)), np.full(len(strand.steps), rank)
            target = strand.target(turns, ranks)
            start, stop = strand.span(turns, ranks)
            for turn, peer, low, high in _rows(strand.moving(target, start, stop), turns, target, start, stop):
                yield strand.steps[turn], Send(peer, low, high)

    def recvs(self, rank: int) -> Iterator[tuple[int, Recv]]:
        """What the rank receives."""
        for strand in self.strands:
            turns, ranks = np.arange(len(strand.steps)), np.full(len(strand.steps), rank)
            source = strand.source(turns, ranks)
            start, stop = strand.span(turns, source)
            for turn, peer, low, high in _rows(strand.moving(source, start, stop), turns, source, start, stop):
                yield strand.steps[turn], Recv(peer, low, high, strand.combine)

    def computes(self, rank: int) -> Iterator[tuple[int, int, int, int, bool]]:
        """What the rank computes."""
        if self.finish:
            start, stop = (int(bound[0]) for bound in self.finish.span(np.array([rank])))
            if start < stop:
                yield self.finish.step, 0, start, stop, True

    def _finished(self, index: int, ranks: Ints) -> Computes:
        if not self.finish or self.finish.step != index:
            return _IDLE
        start, stop = self.finish.span(ranks)
        rows = start < stop
        zero, one = np.zeros(rows.sum()), np.ones(rows.sum())
        return Computes(
            column(ranks[rows], np.int32),
            column(zero, np.int32),
            column(start[rows], np.int64),
            column(stop[rows], np.int64),
            column(one, np.bool_),
        )


def schedule(
    kind: str,
    algorithm: str,
    world: int,
    count: int,
    strands: tuple[Strand, ...],
    *,
    held: Callable[[int], Ranges],
    wanted: Callable[[int], Ranges],
    finish: Finish | None = None,
) -> Schedule:
    """The schedule of these strands; its only kernel is "finish", where there is one."""
    kernels = ("finish",) if finish else ()
    return Schedule(kind, algorithm, world, count, kernels, Strands(world, strands, finish), held, wanted)


def remembered(factory: Callable[P, Schedule]) -> Callable[P, Schedule]:
    """Keep the last schedules that a factory made, so that asking again for the same one costs nothing."""
    return cast(Callable[P, Schedule], functools.lru_cache(maxsize=256)(factory))


def everything(count: int) -> Callable[[int], Ranges]:
    """The whole buffer, on every rank."""
    return lambda rank: ((0, count),)


def chunks(count: int, world: int) -> Callable[[int], Ranges]:
    """Chunk `r` of `split(count, world)`, on rank `r`."""

    def own(rank: int) -> Ranges:
        start, stop = chunk(count, world, np.array([rank]))
        return ((int(start[0]), int(stop[0])),)

    return own


_NO_ROWS: tuple[npt.NDArray[Any], ...] = (np.zeros(0, np.int64),) * 4 + (np.zeros(0, np.bool_),)
_IDLE = Computes.of()


def _rows(where: Bools, *columns: Ints) -> Iterator[tuple[int, ...]]:
    return zip(*(values[where].tolist() for values in columns), strict=True)
