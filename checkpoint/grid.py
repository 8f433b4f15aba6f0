"""The grid on which a tensor is cut into chunks. It follows from dtype and shape alone, never from a layout.

So the same tensor has the same chunks whoever saves it, and checkpoints of different layouts share them. Readers take
the grid that a manifest states; writers make it with `Grid.of`.

Each dimension is cut twice: into `parts` balanced parts, eight where the tensor is large enough, and each of these into
`pieces`. A split by 2, 4 or 8 along one of the first two dimensions then falls on boundaries (for an extent that 8
divides; else by 8 alone), so that a rank's shard is whole chunks and nothing else is read.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Self, TypeAlias

from collectives.errors import UsageError
from collectives.region import Region, split

Cut: TypeAlias = tuple[int, int]
"""Parts, and pieces of each part."""

PARTS = 8
"""Parts of a dimension that is worth cutting: what one tensor-parallel rank of eight holds is one of them."""
SMALLEST = 16 << 10
"""The first two dimensions are not cut into chunks of fewer bytes."""
USUAL = 1 << 20
"""Nor are further dimensions into chunks of fewer bytes than this."""
LARGEST = 2 << 20
"""Chunks of more bytes are cut further, where they can be."""
LEADING = 2
"""How many dimensions are cut as far as `SMALLEST`."""


@dataclass(frozen=True)
class Grid:
    """The chunks of a tensor of `shape`: boxes in row-major order, numbered from 0. An empty tensor has none.

    Raises:
        UsageError: not one cut for each dimension, or one that leaves a part empty.

    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        if len(self.cuts) != len(self.shape):
            raise UsageError(f"a grid for shape {self.shape} needs a cut for each dimension, not {self.cuts}")
        for extent, (parts, pieces) in zip(self.shape, self.cuts, strict=True):
            if min(parts, pieces) < 1 or parts * pieces > max(extent, 1):
                raise UsageError(f"a dimension of {extent} cannot be cut into {parts} parts of {pieces} pieces")

    @classmethod
    def of(cls, shape: tuple[int, ...], itemsize: int) -> Self:
        """The grid of every tensor of this shape whose elements have `itemsize` bytes."""
        size = math.prod(shape) * itemsize
        cuts = [(1, 1)] * len(shape)
        if size == 0:
            return cls(shape, tuple(cuts))
        leading = [dim for dim, extent in enumerate(shape) if extent > 1][:LEADING]
        for dim, extent in enumerate(shape):
            least = SMALLEST if dim in leading else USUAL
            parts = next((n for n in (PARTS, 4, 2) if n <= extent and size // n >= least), 1)
            cuts[dim] = (parts, 1)
            size //= parts
        for dim, extent in enumerate(shape):
            parts, pieces = cuts[dim]
            while size > LARGEST and parts * pieces * 2 <= extent:
                pieces, size = pieces * 2, size // 2
            cuts[dim] = (parts, pieces)
        return cls(shape, tuple(cuts))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each dimension."""
        return tuple(0 if extent == 0 else parts * pieces for extent, (parts, pieces) in self._dims)

    @property
    def count(self) -> int:
        """Number of chunks."""
        return math.prod(self.counts)

    @property
    def _dims(self) -> Iterator[tuple[int, Cut]]:
        return zip(self.shape, self.cuts, strict=True)

    @cached_property
    def edges(self) -> tuple[tuple[int, ...], ...]:
        """Along each dimension, where chunks begin, and the extent at the end."""
        return tuple(_edges(extent, cut) for extent, cut in self._dims)

    def box(self, index: int) -> Region:
        """The elements of a chunk."""
        place = []
        for count in reversed(self.counts):
            index, at = divmod(index, count)
            place.append(at)
        place.reverse()
        return Region(
            tuple(edges[at] for edges, at in zip(self.edges, place, strict=True)),
            tuple(edges[at + 1] for edges, at in zip(self.edges, place, strict=True)),
        )

    def boxes(self) -> Iterator[Region]:
        """The elements of every chunk, in order."""
        return (self.box(index) for index in range(self.count))

    def touching(self, region: Region) -> Iterator[int]:
        """Numbers of the chunks that have elements of this region, ascending."""
        if region.empty:
            return
        spans = [
            range(bisect_right(edges, first) - 1, bisect_left(edges, last))
            for edges, first, last in zip(self.edges, region.start, region.stop, strict=True)
        ]
        counts = self.counts
        for place in product(*spans):
            index = 0
            for at, count in zip(place, counts, strict=True):
                index = index * count + at
            yield index


def _edges(extent: int, cut: Cut) -> tuple[int, ...]:
    parts, pieces = cut
    if parts == pieces == 1:
        return 0, extent  # most dimensions of the many small tensors of a state
    inner = (first + start for first, last in split(extent, parts) for start, _ in split(last - first, pieces))
    return (*inner, extent)
