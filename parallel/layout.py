"""Where the state of one tensor lives: a mesh of ranks and, for each axis of it, a placement.

The placements are those of OneFlow's SBP (arXiv 2110.15032): split, broadcast, partial; and `Flat`, for optimizers that
cut a flattened parameter without regard to its dimensions (ZeRO). From a layout, a shape and a rank follows the `Shard`
that the rank holds. Checkpoints save and load by it, `reshard` moves between two of it, planners choose it. Nothing
here knows of files, dtypes or torch.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeAlias

import numpy as np

from collectives.errors import UsageError
from collectives.region import Range, Ranges, Region, chunk

REDUCTIONS = ("sum", "avg", "min", "max", "prod")
"""Ways in which partial values combine."""


@dataclass(frozen=True, slots=True)
class Split:
    """Each rank of the axis holds a part of dimension `dim`: balanced, the remainder one each to the first ranks."""

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise UsageError(f"a split needs a dimension of 0 or more, not {self.dim}")

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Each rank of the axis holds all of it."""

    def __str__(self) -> str:
        return "B"


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank of the axis holds values of the full shape that give the tensor when combined by `op`."""

    op: str = "sum"

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            raise UsageError(f"partial values combine by one of {', '.join(REDUCTIONS)}, not {self.op!r}")

    def __str__(self) -> str:
        return "P" if self.op == "sum" else f"P({self.op})"


@dataclass(frozen=True, slots=True)
class Flat:
    """Each rank of the axis holds a range of what remains after all `Split`s, flattened: balanced like a split."""

    def __str__(self) -> str:
        return "F"


Placement: TypeAlias = Split | Broadcast | Partial | Flat


def parse_placement(text: str) -> Placement:
    """Read what `str` of a placement writes: `S(0)`, `B`, `P`, `P(max)`, `F`.

    Raises:
        UsageError: it is none of these.

    """
    word = text.strip()
    if word == "B":
        return Broadcast()
    if word == "F":
        return Flat()
    if word == "P":
        return Partial()
    inside = word[2:-1] if word[1:2] == "(" and word.endswith(")") else ""
    if word.startswith("S") and inside.isdecimal():
        return Split(int(inside))
    if word.startswith("P") and inside:
        return Partial(inside)
    raise UsageError(f"{text!r} is no placement; write S(dim), B, P, P(op) or F")


@dataclass(frozen=True)
class Mesh:
    """Ranks in a grid with named axes; the last axis varies fastest.

    Args:
        axes: name and size of each axis, for instance `(("dp", 2), ("tp", 4))`. No axes: one rank.
        ranks: the global rank at each place, in row-major order; empty: 0, 1, 2...

    Raises:
        UsageError: an axis without ranks, two axes of one name, a rank named twice, or too few or many of them.

    """

    axes: tuple[tuple[str, int], ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) < len(names):
            raise UsageError(f"two axes of a mesh have one name: {', '.join(names)}")
        if any(size < 1 for size in self.shape):
            raise UsageError(f"every axis of a mesh needs at least one rank, not {self}")
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(self.size)))
        if len(self.ranks) != self.size or len(set(self.ranks)) < self.size or min(self.ranks) < 0:
            raise UsageError(f"mesh {self} needs {self.size} different ranks, not {list(self.ranks)}")

    @classmethod
    def of(cls, **axes: int) -> Self:
        """`Mesh.of(dp=2, tp=4)`: axes in this order, ranks 0, 1, 2..."""
        return cls(tuple(axes.items()))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes) or "one rank"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    @cached_property
    def _places(self) -> dict[int, tuple[int, ...]]:
        return dict(zip(self.ranks, np.ndindex(self.shape), strict=True))

    def place(self, rank: int) -> tuple[int, ...]:
        """Coordinates of a global rank, one for each axis.

        Raises:
            UsageError: the rank is not on the mesh.

        """
        if rank not in self._places:
            raise UsageError(f"rank {rank} is not on mesh {self} of ranks {list(self.ranks)}")
        return self._places[rank]

    def groups(self, axis: int) -> tuple[tuple[int, ...], ...]:
        """The lines of the grid along an axis: global ranks that differ in this coordinate only, in its order."""
        grid = np.moveaxis(np.array(self.ranks).reshape(self.shape), axis, -1)
        return tuple(tuple(line) for line in grid.reshape(-1, self.shape[axis]).tolist())


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a tensor: elements `[start, stop)` of the row-major flattened `box`.

    All of the box, unless an optimizer cut it flat. `partial`: its values are one term of the reduction `partial[0]`
    over the ranks that hold the same elements (several axes: the outer ones first).
    """

    box: Region
    start: int
    stop: int
    partial: tuple[str, ...] = ()

    @classmethod
    def of(cls, box: Region) -> Self:
        """All of a box."""
        return cls(box, 0, box.size)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether it is all of its box, so that it has a shape."""
        return self.size == self.box.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds it: the box's, or one dimension where it was cut flat."""
        return self.box.shape if self.whole else (self.size,)

    def boxes(self) -> tuple[tuple[Region, int], ...]:
        """The boxes of the whole tensor that it consists of, and where each begins in the memory that holds the shard.

        One, unless it was cut flat: then at most twice the number of dimensions less one, the first and last of them
        rows that are not whole. Each is one run of the shard's memory. An empty shard has none.
        """
        if self.size == 0:
            return ()
        found: list[tuple[Region, int]] = []
        _cut(self.box, (), self.start, self.stop, found)
        return tuple(found)

    def runs(self, shape: tuple[int, ...]) -> Ranges:
        """The ranges of the flattened whole tensor that it holds, in the order in which it holds them."""
        runs = self.box.runs(shape)
        if self.whole:
            return runs
        found: list[Range] = []
        at = 0
        for first, last in runs:
            low, high = max(self.start - at, 0), min(self.stop - at, last - first)
            if low < high:
                found.append((first + low, first + high))
            at += last - first
        return tuple(found)


@dataclass(frozen=True)
class Layout:
    """Where a tensor lives: on a mesh, by one placement for each of its axes.

    Splits apply to the tensor from the first axis to the last, so two axes may split one dimension; then the `Flat`
    ones, in order. A dimension smaller than its axis gives empty shards.

    Raises:
        UsageError: not one placement for each axis.

    """

    mesh: Mesh
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        if len(self.placements) != len(self.mesh.axes):
            raise UsageError(
                f"mesh {self.mesh} has {len(self.mesh.axes)} axes and needs as many placements, not {self._written()}"
            )

    @classmethod
    def replicated(cls, mesh: Mesh) -> Self:
        """Every rank holds all of it."""
        return cls(mesh, (Broadcast(),) * len(mesh.axes))

    @classmethod
    def single(cls, rank: int = 0) -> Self:
        """One rank holds all of it."""
        return cls(Mesh((), (rank,)), ())

    @classmethod
    def by_axis(cls, mesh: Mesh, **placements: Placement) -> Self:
        """`Layout.by_axis(mesh, tp=Split(0))`: axes that are not named are `Broadcast`.

        Raises:
            UsageError: the mesh has no axis of that name.

        """
        if strangers := sorted(set(placements) - set(mesh.names)):
            raise UsageError(f"mesh {mesh} has no axis {', '.join(strangers)}")
        return cls(mesh, tuple(placements.get(name, Broadcast()) for name in mesh.names))

    def __str__(self) -> str:
        return f"{self.mesh}: {self._written()}"

    def _written(self) -> str:
        return ", ".join(map(str, self.placements)) or "no placements"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `UsageError` if a split is of a dimension that a tensor of this shape does not have."""
        for placement in self.placements:
            if isinstance(placement, Split) and placement.dim >= len(shape):
                raise UsageError(f"{placement} needs a dimension {placement.dim}; the tensor has shape {shape}")

    def shard(self, shape: tuple[int, ...], rank: int) -> Shard:
        """What a global rank holds of a tensor of this shape.

        Raises:
            UsageError: the rank is not on the mesh, or a split is of a dimension that there is not.

        """
        self.check(shape)
        place = self.mesh.place(rank)
        first, last = [0] * len(shape), list(shape)
        for placement, parts, at in zip(self.placements, self.mesh.shape, place, strict=True):
            if isinstance(placement, Split):
                dim = placement.dim
                low, high = _part(last[dim] - first[dim], parts, at)
                first[dim], last[dim] = first[dim] + low, first[dim] + high
        box = Region(tuple(first), tuple(last))
        start, stop = 0, box.size
        for placement, parts, at in zip(self.placements, self.mesh.shape, place, strict=True):
            if isinstance(placement, Flat):
                low, high = _part(stop - start, parts, at)
                start, stop = start + low, start + high
        return Shard(box, start, stop, tuple(p.op for p in self.placements if isinstance(p, Partial)))

    def holders(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same elements as this one, which is among them, in the order of the mesh.

        Along `Broadcast` axes they are replicas of each other, along `Partial` ones terms of one reduction.
        """
        fixed = [isinstance(placement, Split | Flat) for placement in self.placements]
        here = self.mesh.place(rank)
        return tuple(
            other
            for other in self.mesh.ranks
            if all(a == b or not f for a, b, f in zip(self.mesh.place(other), here, fixed, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` reads them back."""
        return {
            "mesh": [[name, size] for name, size in self.mesh.axes],
            "ranks": list(self.mesh.ranks),
            "placements": [str(placement) for placement in self.placements],
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read what `to_json` wrote.

        Raises:
            UsageError: it is something else.

        """
        try:
            axes = tuple((str(name), int(size)) for name, size in data["mesh"])
            ranks = tuple(int(rank) for rank in data["ranks"])
            placements = tuple(parse_placement(text) for text in data["placements"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"a layout has mesh, ranks and placements; this one is malformed ({error!r})") from None
        return cls(Mesh(axes, ranks), placements)


def _part(count: int, parts: int, index: int) -> Range:
    """Part `index` of `split(count, parts)`."""
    start, stop = chunk(count, parts, np.array(index))
    return int(start), int(stop)


def _cut(box: Region, fixed: tuple[int, ...], start: int, stop: int, found: list[tuple[Region, int]]) -> None:
    """Add the boxes of elements `[start, stop)` of `box` in which the first dimensions are `fixed`."""
    dim = len(fixed)
    rest = box.shape[dim:]
    if (start, stop) == (0, math.prod(rest)):
        after = tuple(index + 1 for index in fixed)
        _join(found, Region(fixed + box.start[dim:], after + box.stop[dim:]))
        return
    row = math.prod(rest[1:])
    first, last = -(-start // row), stop // row
    base = box.start[dim]
    if first > last:  # within one row
        _cut(box, (*fixed, base + last), start - last * row, stop - last * row, found)
        return
    if start < first * row:
        _cut(box, (*fixed, base + first - 1), start - (first - 1) * row, row, found)
    if first < last:
        inner = Region(
            (*fixed, base + first, *box.start[dim + 1 :]), (*(i + 1 for i in fixed), base + last, *box.stop[dim + 1 :])
        )
        _join(found, inner)
    if last * row < stop:
        _cut(box, (*fixed, base + last), 0, stop - last * row, found)


def _join(found: list[tuple[Region, int]], box: Region) -> None:
    """Add a box, which lies behind the others in memory."""
    found.append((box, found[-1][1] + found[-1][0].size if found else 0))


def shared(a: Ranges, b: Ranges) -> tuple[tuple[int, int, int], ...]:
    """What two lists of ascending ranges have in common: `(offset in a, offset in b, length)`, as few as there are.

    Offsets count the elements of a list, as they lie in the memory of whoever holds it one range behind the other.
    """
    found: list[tuple[int, int, int]] = []
    i = j = at_a = at_b = 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low < high:
            row = (at_a + low - a[i][0], at_b + low - b[j][0], high - low)
            if found and found[-1][0] + found[-1][2] == row[0] and found[-1][1] + found[-1][2] == row[1]:
                found[-1] = (found[-1][0], found[-1][1], found[-1][2] + row[2])
            else:
                found.append(row)
        if a[i][1] <= b[j][1]:
            at_a += a[i][1] - a[i][0]
            i += 1
        else:
            at_b += b[j][1] - b[j][0]
            j += 1
    return tuple(found)
