"""The parts into which two layouts cut a tensor together. Called by `boxing`, which counts, and `reshard`, which moves.

All elements of a cell are held by the same ranks before and wanted by the same ranks after. What happens to a cell
follows from these two alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from collectives.errors import UsageError
from parallel.layout import Broadcast, Layout, Partial, Placement, Shard, shared

Ranks: TypeAlias = tuple[int, ...]
Nearness: TypeAlias = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the tensor that some ranks hold, those of each tuple with equal values, which are one term of a sum."""

    shard: Shard
    terms: tuple[Ranks, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """A value to be made: of one or more terms, each of which some ranks hold, and wanted by some ranks."""

    terms: tuple[Ranks, ...]
    wanted: Ranks

    @property
    def owners(self) -> Ranks:
        """Ranks that may add up the terms: those that have one and want the sum, else those that have one."""
        having = tuple(rank for ranks in self.terms for rank in ranks)
        return tuple(rank for rank in self.wanted if rank in having) or having


@dataclass(frozen=True, slots=True)
class Cell:
    """Elements of a piece of the layout before that make part of a piece of the layout after.

    `before` and `after` are the two shards; `size` is the number of elements that they share.
    """

    before: Shard
    after: Shard
    size: int
    sums: tuple[Sum, ...]


def pieces(layout: Layout, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The different shards of a layout, but for empty ones, in the order of the mesh."""
    partial = [axis for axis, placement in enumerate(layout.placements) if isinstance(placement, Partial)]
    found: dict[Shard, dict[Ranks, list[int]]] = {}
    for rank in layout.mesh.ranks:
        shard, place = layout.shard(shape, rank), layout.mesh.place(rank)
        if shard.size:
            found.setdefault(shard, {}).setdefault(tuple(place[axis] for axis in partial), []).append(rank)
    return tuple(Piece(shard, tuple(map(tuple, terms.values()))) for shard, terms in found.items())


def cells(a: Layout, b: Layout, shape: tuple[int, ...]) -> Iterator[Cell]:
    """The cells of two layouts, the second `attainable` from the first.

    Raises:
        UsageError: a layout does not suit the shape, or has partial values that combine in different ways.

    """
    return cells_of(pieces(a, shape), pieces(b, shape), shape, nearness(a, b), reduction(a, b).keeps)


def cells_of(
    before: Iterable[Piece], after: Sequence[Piece], shape: tuple[int, ...], near: Nearness, apart: bool = True
) -> Iterator[Cell]:
    """The cells of what is held and what is wanted: by the pieces held, and for each by those wanted.

    `apart`: terms may stay terms, of what is wanted as partial values.
    """
    for held in before:
        for wanted in after:
            size = overlap(held.shard, wanted.shard, shape)
            if size:
                yield Cell(held.shard, wanted.shard, size, _sums(held.terms, wanted.terms, near, apart))


def overlap(a: Shard, b: Shard, shape: tuple[int, ...]) -> int:
    """Number of elements that two shards have in common."""
    common = a.box.intersect(b.box)
    if (a.whole and b.whole) or common.empty:
        return common.size
    return sum(length for _, _, length in shared(a.runs(shape), b.runs(shape)))


def transfers(made: Iterator[Cell]) -> tuple[int, int]:
    """How many elements all ranks send for these cells, and in how many steps."""
    elements = steps = 0
    for cell in made:
        for value in cell.sums:
            if len(value.terms) == 1:
                each, rounds = len(set(value.wanted) - set(value.terms[0])), 1
            else:
                rest = set(value.wanted) - {value.owners[0]}
                each, rounds = len(value.terms) - 1 + len(rest), 1 + bool(rest)
            elements += cell.size * each
            steps = max(steps, rounds if each else 0)
    return elements, steps


@dataclass(frozen=True, slots=True)
class Reduction:
    """How partial values combine before a change of layout, and after it; "sum" where there are none."""

    before: str
    after: str

    @property
    def keeps(self) -> bool:
        """Whether terms may stay apart: they combine afterwards as they did before."""
        return self.before == self.after


IDEMPOTENT = frozenset({"min", "max", "avg"})
"""Reductions of equal values that give the value."""


def attainable(a: Layout, b: Layout) -> Layout:
    """The layout that is made where `b` is wanted of what is in `a`: the same shards, but some replicas for partials.

    Partial values by a reduction in `IDEMPOTENT` stay what they are along an axis where they were so before. Else they
    are made as replicas, which are such values too, and good for whatever may be done with these: filling in infinity
    would not be.
    """
    kept = a.placements if a.mesh == b.mesh else (None,) * len(b.placements)
    made: list[Placement] = [
        Broadcast() if isinstance(after, Partial) and after.op in IDEMPOTENT and after != before else after
        for before, after in zip(kept, b.placements, strict=True)
    ]
    return Layout(b.mesh, tuple(made))


def reduction(a: Layout, b: Layout) -> Reduction:
    """How partial values of a layout combine, and those of one that is `attainable` from it.

    Raises:
        UsageError: in several ways in one of them.

    """
    before = {p.op for p in a.placements if isinstance(p, Partial)}
    after = {p.op for p in b.placements if isinstance(p, Partial)}
    if len(before) > 1 or len(after) > 1:
        raise UsageError(f"cannot go from {a} to {b}: partial values combine in several ways; go by way of B")
    combining = (before or after or {"sum"}).pop()
    return Reduction(combining, after.pop() if after else combining)


def nearness(a: Layout, b: Layout) -> Nearness:
    """How near a rank of `a` is to one of `b`: on one mesh, how many coordinates they have in common."""
    if a.mesh != b.mesh:
        return lambda one, other: int(one == other)
    place = a.mesh.place
    return lambda one, other: sum(x == y for x, y in zip(place(one), place(other), strict=True))


def _sums(terms: tuple[Ranks, ...], groups: tuple[Ranks, ...], near: Nearness, apart: bool) -> tuple[Sum, ...]:
    """Which terms go into which partial value of the layout after: that of which the most ranks have it, or nearly."""
    if len(groups) == 1:
        return (Sum(terms, groups[0]),)

    def kinship(group: Ranks, term: Ranks) -> tuple[int, int]:
        return len(set(group) & set(term)), max(near(one, other) for one in term for other in group)

    if not apart:
        return (Sum(terms, max(groups, key=lambda group: max(kinship(group, term) for term in terms))),)
    chosen: dict[Ranks, list[Ranks]] = {}
    for term in terms:
        chosen.setdefault(max(groups, key=lambda group: kinship(group, term)), []).append(term)
    return tuple(Sum(tuple(mine), group) for group, mine in chosen.items())
