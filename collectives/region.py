"""Regions: boxes of a tensor, the flat runs that they cover, and the balanced split of a range.

Layouts say which `Region` of a tensor a rank holds, checkpoints store tensors region by region, and the algorithms in
`collectives.algorithms` cut a work buffer with `split`. Nothing here knows of ranks or bytes: units are elements.
"""

import math
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from collectives.errors import UsageError

Range: TypeAlias = tuple[int, int]
"""Elements `[start, stop)` of a flat buffer."""
Ranges: TypeAlias = tuple[Range, ...]
Ints: TypeAlias = npt.NDArray[np.int64]


def split(count: int, parts: int) -> Ranges:
    """Cut `[0, count)` into `parts` ranges in order: balanced, the remainder one each to the first parts.

    Parts beyond `count` are empty. 20 elements in 6 parts give lengths 4, 4, 3, 3, 3, 3.

    Raises:
        UsageError: `count` is negative or `parts` is not positive.

    """
    if count < 0 or parts < 1:
        raise UsageError(f"cannot split {count} elements into {parts} parts; give count >= 0 and parts >= 1")
    start, stop = chunk(count, parts, np.arange(parts))
    return tuple(zip(start.tolist(), stop.tolist(), strict=True))


def chunk(count: int, parts: int, index: Ints) -> tuple[Ints, Ints]:
    """Start and stop of the parts `index` (each in `[0, parts)`) of `split(count, parts)`, for whole arrays at once."""
    base, extra = divmod(count, parts)
    start = index * base + np.minimum(index, extra)
    return start, start + base + (index < extra)


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a tensor: the elements whose index `i` has `start[d] <= i[d] < stop[d]` in every dimension `d`.

    A range of a flattened tensor is the box of one dimension (`Region.flat`). The box of no dimensions is the one
    element of a scalar.

    Raises:
        UsageError: `start` and `stop` differ in length, or a dimension starts below 0 or stops before it starts.

    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise UsageError(f"a region needs as many starts as stops, not {self.start} and {self.stop}")
        if any(not 0 <= first <= last for first, last in zip(self.start, self.stop, strict=True)):
            raise UsageError(f"a region needs 0 <= start <= stop in every dimension, not {self.start} to {self.stop}")

    @classmethod
    def flat(cls, start: int, stop: int) -> Self:
        """Elements `[start, stop)` of a flattened tensor."""
        return cls((start,), (stop,))

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Self:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in each dimension."""
        return tuple(last - first for first, last in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def empty(self) -> bool:
        """Whether the region holds no element."""
        return 0 in self.shape

    def intersect(self, other: "Region") -> "Region":
        """The elements in both; an empty region where there are none.

        Raises:
            UsageError: the regions differ in their number of dimensions.

        """
        self._same_dimensions(other)
        start = tuple(map(max, self.start, other.start))
        return Region(start, tuple(map(max, start, map(min, self.stop, other.stop))))

    def contains(self, other: "Region") -> bool:
        """Whether every element of `other` is one of this region; true for an empty `other`.

        Raises:
            UsageError: the regions differ in their number of dimensions.

        """
        return self.intersect(other).size == other.size

    def runs(self, global_shape: tuple[int, ...]) -> Ranges:
        """The flat ranges that this box covers in a row-major tensor of `global_shape`, in order, as few as there are.

        Dimensions that are covered whole join those before them into one run, so a split of dimension 0 is a
        single run whatever the rank of the tensor.

        Raises:
            UsageError: the region does not lie within a tensor of that shape.

        """
        if not Region.whole(global_shape).contains(self):
            raise UsageError(f"region {self.start} to {self.stop} does not lie within a tensor of shape {global_shape}")
        if self.empty:
            return ()
        if not global_shape:
            return ((0, 1),)
        inner = len(global_shape) - 1
        while inner > 0 and self.shape[inner] == global_shape[inner]:
            inner -= 1
        first = np.zeros(1, dtype=np.int64)
        for low, high, extent in zip(self.start[:inner], self.stop[:inner], global_shape, strict=False):
            first = np.add.outer(first * extent, np.arange(low, high)).ravel()
        row = math.prod(global_shape[inner + 1 :])
        start = (first * global_shape[inner] + self.start[inner]) * row
        return tuple(zip(start.tolist(), (start + self.shape[inner] * row).tolist(), strict=True))

    def _same_dimensions(self, other: "Region") -> None:
        if len(self.start) != len(other.start):
            raise UsageError(f"regions of {len(self.start)} and {len(other.start)} dimensions cannot be compared")
