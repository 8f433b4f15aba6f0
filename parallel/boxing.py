"""What it costs to change a placement, in closed form. Called by planners, for every edge that they consider.

Boxing is OneFlow's word for it (arXiv 2110.15032). `boxing` counts the very elements that `reshard` sends, all ranks
together: along one axis of `p` ranks, for a tensor of size T, those of that paper's table 2,

    S -> B   (p-1) T        P -> B   2 (p-1) T      P -> S   (p-1) T        Si -> Sj   (p-1)/p T
    B -> S   0              B -> P   0              S -> P   0

and for several axes the least that an element needs, whatever way through single axes there is. An element that is the
sum of `m` terms and wanted by `d` ranks takes `m - 1` transfers to be added up, where one of those `d` has a term (else
one more), and `d - 1` to reach the others; an element that is whole somewhere takes one for each rank that lacks it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from collectives.region import Ints, split
from parallel.cells import attainable, cells, reduction, transfers
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Split

LOCAL = frozenset({"none", "local"})
"""Kinds that send nothing."""
_Kinds = dict[tuple[type[Placement], type[Placement]], str]
_KINDS: _Kinds = {
    (Split, Broadcast): "all_gather",
    (Flat, Broadcast): "all_gather",
    (Partial, Broadcast): "all_reduce",
    (Partial, Split): "reduce_scatter",
    (Partial, Flat): "reduce_scatter",
    (Split, Split): "all_to_all",
    (Split, Flat): "all_to_all",
    (Flat, Split): "all_to_all",
    (Partial, Partial): "reduce",
}
"""What a change along one axis is; those that are not here take place within each rank."""


@dataclass(frozen=True, slots=True)
class Boxing:
    """A change of placement as a planner sees it.

    Attributes:
        kind: "none" (it is the same), "local" (each rank cuts, or fills with zeros, what it has), "all_gather",
            "reduce_scatter", "all_reduce", "all_to_all", "reduce" (to
            a partial value of another kind), or "exchange" where it is several of these at once or between
            different meshes.
        axes: names of the mesh axes along which elements travel; empty between different meshes.
        elements: sent, by all ranks together.
        steps: how many messages one behind the other: 0, 1, or 2 where sums are made and then told to others.

    """

    kind: str
    axes: tuple[str, ...]
    elements: int
    steps: int

    @property
    def launches(self) -> int:
        """Collective operations that it takes: one, or none."""
        return int(self.steps > 0)


@lru_cache(maxsize=1 << 16)
def boxing(a: Layout, b: Layout, shape: tuple[int, ...]) -> Boxing:
    """What it takes to bring a tensor of this shape from layout `a` to layout `b`.

    Raises:
        UsageError: a layout does not suit the shape, or `reshard` cannot do it (partial values of several kinds).

    """
    a.check(shape)
    b.check(shape)
    if a == b:
        return Boxing("none", (), 0, 0)
    b = attainable(a, b)
    keeps = reduction(a, b).keeps
    if a.mesh != b.mesh or Flat() in a.placements + b.placements:
        elements, steps = transfers(cells(a, b, shape))
    else:
        elements, steps = _within(a.mesh, a.placements, b.placements, shape, keeps)
    if not elements:
        return Boxing("local", (), 0, 0)
    if a.mesh != b.mesh:
        return Boxing("exchange", (), elements, steps)
    kinds, axes = _moving(a, b)
    return Boxing(kinds.pop() if len(kinds) == 1 else "exchange", axes, elements, steps)


def _within(
    mesh: Mesh, a: tuple[Placement, ...], b: tuple[Placement, ...], shape: tuple[int, ...], keeps: bool
) -> tuple[int, int]:
    """Elements and steps within a mesh, for layouts that cut boxes.

    Terms of an element that differ along axes which stay partial stay apart, if they may: there are `sums` sums of
    `terms` terms. Each is wanted by `wanted` ranks. Where the cuts leave the element in its place, `there` of these
    have it whole.
    """
    size = dict(zip(range(len(a)), mesh.shape, strict=True))
    partial = [x for x in size if isinstance(a[x], Partial)]
    sums = math.prod(size[x] for x in partial if keeps and isinstance(b[x], Partial))
    terms = math.prod(size[x] for x in partial) // sums
    wanted = math.prod(p for x, p in size.items() if isinstance(b[x], Broadcast))
    there = math.prod(p for x, p in size.items() if isinstance(a[x], Broadcast) and isinstance(b[x], Broadcast))
    count, staying = math.prod(shape), _staying(mesh, a, b, shape)
    if terms == 1:
        elements = sums * (count * wanted - staying * there)
    else:
        elements = sums * (count * (terms - 1 + wanted) - staying)
    if not elements:
        return 0, 0
    return elements, 2 if terms > 1 and (wanted > 1 or staying < count) else 1


def _staying(mesh: Mesh, a: tuple[Placement, ...], b: tuple[Placement, ...], shape: tuple[int, ...]) -> int:
    """How many elements the axes that are split on both sides put in the same places."""
    both = [x for x in range(len(a)) if isinstance(a[x], Split) and isinstance(b[x], Split)]
    if all(_cuts(a, x) == _cuts(b, x) for x in both):
        return math.prod(shape)
    edges, ours, theirs = [], [], []
    for dim, extent in enumerate(shape):
        marks_a, marks_b = _marks(mesh, a, dim, extent), _marks(mesh, b, dim, extent)
        cut = np.unique(np.concatenate([[0, extent], *(m[1] for m in (*marks_a, *marks_b))]))
        edges.append(cut)
        ours.append({axis: places[np.searchsorted(at, cut[:-1], "right") - 1] for axis, at, places in marks_a})
        theirs.append({axis: places[np.searchsorted(at, cut[:-1], "right") - 1] for axis, at, places in marks_b})
    total = 0
    for place in product(*(range(mesh.shape[axis]) for axis in both)):
        found = 1
        for cut, mine, yours in zip(edges, ours, theirs, strict=True):
            length = np.diff(cut)
            keep = np.ones(len(length), dtype=bool)
            for axis, at in zip(both, place, strict=True):
                for placed in (mine, yours):
                    if axis in placed:
                        keep &= placed[axis] == at
            found *= int(length[keep].sum())
        total += found
    return total


def _cuts(placements: tuple[Placement, ...], axis: int) -> tuple[Placement | None, ...]:
    """What decides where a split axis puts an element: itself and the axes before it that split the same dimension."""
    return tuple(p if p == placements[axis] else None for p in placements[: axis + 1])


def _marks(mesh: Mesh, placements: tuple[Placement, ...], dim: int, extent: int) -> list[tuple[int, Ints, Ints]]:
    """For each axis that splits a dimension: where parts begin, and the place on the axis that has them."""
    starts, lengths, found = np.zeros(1, np.int64), np.array([extent]), []
    for axis, placement in enumerate(placements):
        if placement == Split(dim):
            parts = [split(int(length), mesh.shape[axis]) for length in lengths]
            rows = [(at + lo, hi - lo, i) for at, p in zip(starts, parts, strict=True) for i, (lo, hi) in enumerate(p)]
            starts, lengths, places = (np.array(column) for column in zip(*rows, strict=True))
            filled = lengths > 0
            found.append((axis, starts[filled], places[filled]))
    return found


def _moving(a: Layout, b: Layout) -> tuple[set[str], tuple[str, ...]]:
    """Kinds of change along the axes along which something moves, and the names of these."""
    kinds, axes = set(), []
    for x, (before, after) in enumerate(zip(a.placements, b.placements, strict=True)):
        kind = _KINDS.get((type(before), type(after)))
        steady = before == after and (not isinstance(after, Split | Flat) or _same_before(a, b, x))
        if kind is not None and not steady and a.mesh.shape[x] > 1:
            kinds.add(kind)
            axes.append(a.mesh.names[x])
    return kinds, tuple(axes)


def _same_before(a: Layout, b: Layout, axis: int) -> bool:
    if isinstance(a.placements[axis], Flat):
        return [p for p in a.placements if isinstance(p, Split | Flat)] == [
            p for p in b.placements if isinstance(p, Split | Flat)
        ]
    return _cuts(a.placements, axis) == _cuts(b.placements, axis)
