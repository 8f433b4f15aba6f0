"""Strands: rules from which the steps of a schedule are produced on demand, for all ranks or for one.

The algorithms of this folder are written as strands. A strand is a movement in which each rank sends to at most one
rank and receives from at most one rank in a turn; the rules give peers and ranges for whole arrays of turns and ranks
at once. So a step of 4096 ranks is a handful of array operations, and so is one rank's part of 8190 steps.

A strand made for a small world can be lifted into a larger one, where several teams of ranks follow it side by side.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from collectives.algorithms.parts import Parts, Span
from collectives.region import Ints, Ranges
from collectives.schedule import NO_OPERANDS, Bools, Computes, Operands, Recv, Schedule, Send, Step, column

P = ParamSpec("P")
Peers: TypeAlias = Callable[[Ints, Ints], Ints]
NOBODY = -1
"""What a peer rule returns for a rank that stands still in that turn."""


@dataclass(frozen=True, slots=True)
class Strand:
    """At most one transfer out of a rank and one into it a turn; one turn a step, or several at once.

    Turn `t`, counted from 0, belongs to step `steps[t // turns]`. All rules take an array of turns and one of ranks,
    of equal length, and return arrays of that length. `source` is the inverse of `target`: `target(t, s) == r` if and
    only if `source(t, r) == s`.
    """

    steps: range
    target: Peers
    """(turn, rank) -> the rank that it sends to, or NOBODY."""
    source: Peers
    """(turn, rank) -> the rank that it receives from, or NOBODY."""
    span: Callable[[Ints, Ints], Span]
    """(turn, sending rank) -> start and stop. Empty ranges are not sent, unless the strand notifies."""
    combine: bool = False
    notify: bool = False
    turns: int = 1
    """Turns in each step: they happen at once, and their rows are in this order."""
    active: Callable[[Ints], tuple[Ints, Ints]] | None = None
    """(turns) -> the pairs of turn and rank that may send, turn by turn, where these are few of all pairs."""

    def all_turns(self) -> Ints:
        """The numbers of all turns."""
        return np.arange(len(self.steps) * self.turns)

    def senders(self, turns: Ints, world: int) -> tuple[Ints, Ints]:
        """Pairs of turn and rank, among them all that send in these turns; turn by turn."""
        if self.active is not None:
            return self.active(turns)
        return np.repeat(turns, world), np.tile(np.arange(world), len(turns))

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
    """A program (`collectives.schedule.Program`) of strands and finishes."""

    world: int
    strands: tuple[Strand, ...]
    finishes: tuple[Finish, ...] = ()

    def __len__(self) -> int:
        ends = [strand.steps.stop for strand in self.strands if strand.steps]
        return max([*ends, *(finish.step + 1 for finish in self.finishes)], default=0)

    def step(self, index: int) -> Step:
        """All rows of a step: strand by strand, turn by turn, and in the order of sending ranks."""
        parts = [_NO_ROWS]
        for strand in self.strands:
            if index in strand.steps:
                first = (index - strand.steps.start) * strand.turns
                turns, ranks = strand.senders(np.arange(first, first + strand.turns), self.world)
                target = strand.target(turns, ranks)
                start, stop = strand.span(turns, ranks)
                moving = strand.moving(target, start, stop)
                combine = np.full(len(ranks), strand.combine)
                parts.append(tuple(values[moving] for values in (ranks, target, start, stop, combine)))
        src, dst, start, stop, combine = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return Step(
            column(src, np.int32),
            column(dst, np.int32),
            column(start, np.int64),
            column(stop, np.int64),
            column(combine, np.bool_),
            self._finished(index),
        )

    def sends(self, rank: int) -> Iterator[tuple[int, Send]]:
        """What the rank sends."""
        for strand in self.strands:
            turns = strand.all_turns()
            ranks = np.full(len(turns), rank)
            target = strand.target(turns, ranks)
            start, stop = strand.span(turns, ranks)
            for turn, peer, low, high in _rows(strand.moving(target, start, stop), turns, target, start, stop):
                yield strand.steps[turn // strand.turns], Send(peer, low, high)

    def recvs(self, rank: int) -> Iterator[tuple[int, Recv]]:
        """What the rank receives."""
        for strand in self.strands:
            turns = strand.all_turns()
            source = strand.source(turns, np.full(len(turns), rank))
            start, stop = strand.span(turns, source)
            for turn, peer, low, high in _rows(strand.moving(source, start, stop), turns, source, start, stop):
                yield strand.steps[turn // strand.turns], Recv(peer, low, high, strand.combine)

    def computes(self, rank: int) -> Iterator[tuple[int, int, int, int, bool, Operands]]:
        """What the rank computes."""
        for finish in self.finishes:
            start, stop = (int(bound[0]) for bound in finish.span(np.array([rank])))
            if start < stop:
                yield finish.step, 0, start, stop, True, NO_OPERANDS

    def _finished(self, index: int) -> Computes:
        ranks = np.arange(self.world)
        spans = [finish.span(ranks) for finish in self.finishes if finish.step == index]
        if not spans:
            return _IDLE
        rank = np.tile(ranks, len(spans))
        start, stop = (np.concatenate(bounds) for bounds in zip(*spans, strict=True))
        rows = start < stop
        zero, one = np.zeros(rows.sum()), np.ones(rows.sum())
        return Computes(
            column(rank[rows], np.int32),
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
    finishes: tuple[Finish, ...] = (),
) -> Schedule:
    """The schedule of these strands; its only kernel is "finish", where there are finishes."""
    kernels = ("finish",) if finishes else ()
    return Schedule(kind, algorithm, world, count, kernels, Strands(world, strands, finishes), held, wanted)


def lifted(strand: Strand, world: int, members: Ints) -> Strand:
    """The strand of a team, followed by several teams at once in a larger world.

    `members` has shape (teams, team size): row `i` are the ranks of team `i` in the order in which the strand numbers
    them. No rank is in two teams; ranks in none stand still. Ranges stay as they are.
    """
    team, place = np.full(world, NOBODY), np.full(world, NOBODY)
    teams, size = members.shape
    team[members], place[members] = np.arange(teams)[:, None], np.arange(size)

    def by(rule: Peers) -> Peers:
        def peer(turn: Ints, rank: Ints) -> Ints:
            met = rule(turn, place[rank])
            return np.where((team[rank] == NOBODY) | (met == NOBODY), NOBODY, members[team[rank], met])

        return peer

    def span(turn: Ints, rank: Ints) -> Span:
        return strand.span(turn, place[rank])

    def active(turns: Ints) -> tuple[Ints, Ints]:
        turn, at = strand.senders(turns, size)
        return np.repeat(turn, teams), members[:, at].T.ravel()

    return replace(strand, target=by(strand.target), source=by(strand.source), span=span, active=active)


def outward(world: int, root: int, span: Callable[[Ints, Ints], Span]) -> tuple["Star", "Star"]:
    """The star round a root: how it gives to every other rank in one step, and how it takes from them.

    In turn `t` the rank `t + 1` after the root has its turn, round the circle; `span` may go by the turn alone.
    """

    def far(turn: Ints, rank: Ints) -> Ints:
        return np.where(rank == root, (root + 1 + turn) % world, NOBODY)

    def near(turn: Ints, rank: Ints) -> Ints:
        return np.where((rank - root - 1) % world == turn, root, NOBODY)

    def star(active: Peers, target: Peers, source: Peers) -> Star:
        def at(step: int, combine: bool = False) -> Strand:
            return Strand(
                steps=range(step, step + (world > 1)),
                target=target,
                source=source,
                span=span,
                combine=combine,
                turns=max(1, world - 1),
                active=lambda turns: (turns, active(turns, root + 0 * turns)),
            )

        return at

    return star(lambda turn, rank: rank, far, near), star(far, near, far)


class Star(Protocol):
    """One step between a root and all other ranks."""

    def __call__(self, step: int, combine: bool = False) -> Strand:
        """The strand for that step."""


def finishing(finish: bool, step: int, parts: Parts) -> tuple[Finish, ...]:
    """If asked for, the finish in which each rank deals with its own part."""
    return (Finish(step, parts),) if finish else ()


def finishing_root(finish: bool, step: int, root: int, count: int) -> tuple[Finish, ...]:
    """If asked for, the finish in which the root deals with the whole buffer."""
    return finishing(finish, step, lambda rank: (np.zeros_like(rank), np.where(rank == root, count, 0)))


def whole(count: int) -> Callable[[Ints, Ints], Span]:
    """The whole buffer, as the range of each transfer of a strand."""
    return lambda turn, rank: (np.zeros_like(rank), np.full_like(rank, count))


def remembered(factory: Callable[P, Schedule]) -> Callable[P, Schedule]:
    """Keep the last schedules that a factory made, so that asking again for the same one costs nothing."""
    return cast(Callable[P, Schedule], functools.lru_cache(maxsize=256)(factory))


_NO_ROWS: tuple[npt.NDArray[Any], ...] = (np.zeros(0, np.int64),) * 4 + (np.zeros(0, np.bool_),)
_IDLE = Computes.of()


def _rows(where: Bools, *columns: Ints) -> Iterator[tuple[int, ...]]:
    return zip(*(values[where].tolist() for values in columns), strict=True)
