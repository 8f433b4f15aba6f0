"""Tensors that are read when they are asked for: stored ranges of files, and tensors put together from others.

Readers build one `Lazy` for each tensor of a checkpoint, out of what its ranks stored; writers read boxes of it. No
value is computed but averages and casts: elements are moved as bytes. What no part covers cannot be read, so padding
and missing pieces never pass for data: `Placed` and `Flat` prove at construction that their parts cover the whole.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpoint.dtypes import FLOATS, NUMPY, itemsize
from checkpoint.files import File
from checkpoint.source import BLOCK_BYTES, Bytes
from collectives.errors import CorruptFile, RingholdError, UnsupportedTensor
from collectives.region import Region

Elements = npt.NDArray[np.generic]
"""An array whose items are as wide as the tensor's, whatever they mean."""


class PiecesMissing(RingholdError):
    """What the ranks stored does not make up a whole tensor, or makes up more than it."""

    exit_code = 4


def carrier(dtype: str) -> np.dtype[np.generic]:
    """A numpy dtype as wide as `dtype`, to move elements without meaning."""
    width = itemsize(dtype)
    return np.dtype(f"<u{width}" if width <= 8 else f"V{width}")


class Lazy(ABC):
    """A tensor of a dtype and a shape whose boxes can be read. Thread-safe."""

    dtype: str
    shape: tuple[int, ...]

    @abstractmethod
    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`: of the box's shape and the carrier's dtype, with any strides."""

    def read(self, box: Region) -> Bytes:
        """Return the bytes of a box, in row-major order."""
        out = np.empty(box.shape, carrier(self.dtype))
        if out.size:
            self.fill(box, out)
        return out.reshape(-1).view(np.uint8)

    def whole(self) -> Bytes:
        """Return all bytes."""
        return self.read(Region.whole(self.shape))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored(Lazy):
    """Elements in a file: the first at byte `offset`, the others `strides` elements apart."""

    file: File
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.size and (self.offset < 0 or self.offset + self._span(self.shape) > self.file.size):
            raise CorruptFile(
                f"{self.file.path} has {self.file.size} bytes, and a tensor of shape {self.shape} is said to end at "
                f"byte {self.offset + self._span(self.shape)}: it is truncated or damaged; copy it again"
            )

    @classmethod
    def packed(cls, file: File, offset: int, dtype: str, shape: tuple[int, ...]) -> "Stored":
        """Elements one behind the other, row-major."""
        return cls(file, offset, dtype, shape, row_major(shape))

    def _span(self, shape: tuple[int, ...]) -> int:
        """Bytes from the first element of a box of this shape to behind its last."""
        last = sum((extent - 1) * stride for extent, stride in zip(shape, self.strides, strict=True))
        return (last + 1) * itemsize(self.dtype)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one behind the other."""
        return self.strides == row_major(self.shape) or self.size <= 1

    def flat(self, start: int, stop: int) -> "Stored":
        """Elements `[start, stop)` of a contiguous tensor, flattened."""
        if not self.contiguous:
            raise UnsupportedTensor(f"{self.file.path}: a tensor with strides {self.strides} cannot be cut flat")
        if not 0 <= start <= stop <= self.size:
            raise CorruptFile(f"{self.file.path}: elements {start} to {stop} of a tensor of {self.size}")
        return Stored.packed(self.file, self.offset + start * itemsize(self.dtype), self.dtype, (stop - start,))

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        at = self.offset + itemsize(self.dtype) * sum(
            first * stride for first, stride in zip(box.start, self.strides, strict=True)
        )
        self._fill(at, out, self.strides)

    def _fill(self, at: int, out: Elements, strides: tuple[int, ...]) -> None:
        kept = [index for index, extent in enumerate(out.shape) if extent != 1]
        if len(kept) < out.ndim:
            out, strides = out.reshape([out.shape[i] for i in kept]), tuple(strides[i] for i in kept)
        if strides == row_major(out.shape) and out.flags.c_contiguous:
            self.file.read_into(at, out.reshape(-1).view(np.uint8))
            return
        width = itemsize(self.dtype)
        span = (sum((extent - 1) * stride for extent, stride in zip(out.shape, strides, strict=True)) + 1) * width
        if span <= BLOCK_BYTES and span <= 8 * out.nbytes:
            data = np.empty(span // width, carrier(self.dtype))
            self.file.read_into(at, data.view(np.uint8))
            out[...] = np.lib.stride_tricks.as_strided(data, out.shape, [stride * width for stride in strides])
            return
        for index in range(out.shape[0]):
            self._fill(at + index * strides[0] * width, out[index], strides[1:])


@dataclass(frozen=True)
class Given(Lazy):
    """A small tensor that is in memory: a step counter, a scalar."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        out[...] = np.frombuffer(self.data, carrier(self.dtype)).reshape(self.shape)[slices(box)]


def scalar(value: float) -> Given:
    """A number as a tensor of no dimensions, F32."""
    return Given(np.float32(value).tobytes(), "F32", ())


class Flat(Lazy):
    """A tensor of which ranges of the flattened form are stored: `(first element, stored)` in any order.

    Raises:
        PiecesMissing: ranges overlap, or do not make up the tensor.

    """

    def __init__(self, name: str, shape: tuple[int, ...], runs: Sequence[tuple[int, Stored]]) -> None:
        ordered = sorted((run for run in runs if run[1].size), key=lambda run: run[0])
        at = 0
        for start, stored in ordered:
            if start != at:
                raise PiecesMissing(
                    f"{name}: elements {min(at, start)} to {max(at, start)} of the flattened tensor of shape {shape} "
                    f"are stored {'by no rank' if start > at else 'twice'}; is a file missing or of another run?"
                )
            at += stored.size
        if at != math.prod(shape):
            raise PiecesMissing(
                f"{name}: the ranks store {at} elements of {math.prod(shape)} (shape {shape}); is a file missing?"
            )
        self.shape = shape
        self.dtype = ordered[0][1].dtype if ordered else "F32"
        if any(stored.dtype != self.dtype for _, stored in ordered):
            raise PiecesMissing(f"{name}: ranks store it in different dtypes")
        self._starts = [start for start, _ in ordered]
        self._runs = ordered

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        if len(self._runs) == 1:
            stored = self._runs[0][1]
            Stored.packed(stored.file, stored.offset, self.dtype, self.shape).fill(box, out)
            return
        if not out.flags.c_contiguous:
            data = np.empty(box.shape, out.dtype)
            self.fill(box, data)
            out[...] = data
            return
        flat, at = out.reshape(-1), 0
        for first, last in box.runs(self.shape):
            index, here = bisect_right(self._starts, first) - 1, first
            while here < last:
                start, stored = self._runs[index]
                stop = min(last, start + stored.size)
                stored.fill(Region.flat(here - start, stop - start), flat[at : at + stop - here])
                at, here, index = at + stop - here, stop, index + 1


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor, and where its elements are: the box of `tensor` of the same shape from `start` on."""

    box: Region
    tensor: Lazy
    start: tuple[int, ...]


class Placed(Lazy):
    """A tensor that is made up of boxes of others.

    Raises:
        PiecesMissing: boxes overlap, leave a gap, or differ in dtype.

    """

    def __init__(self, name: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
        self.shape = shape
        self._parts = [part for part in parts if not part.box.empty]
        self.dtype = parts[0].tensor.dtype if parts else "F32"
        whole = Region.whole(shape)
        for part in self._parts:
            if part.tensor.dtype != self.dtype:
                raise PiecesMissing(f"{name}: parts are stored as {self.dtype} and {part.tensor.dtype}")
            if not whole.contains(part.box):
                raise PiecesMissing(f"{name}: a part lies at {part.box.start} to {part.box.stop}, outside of {shape}")
        stored = sum(part.box.size for part in self._parts)
        if stored != math.prod(shape) or _overlap([part.box for part in self._parts]):
            raise PiecesMissing(
                f"{name}: the parts store {stored} elements of {math.prod(shape)} (shape {shape}), or some twice; "
                f"is a file missing or of another run?"
            )

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        for part in self._parts:
            common = box.intersect(part.box)
            if not common.empty:
                there = tuple(c - b + s for c, b, s in zip(common.start, part.box.start, part.start, strict=True))
                inner = Region(there, tuple(a + b for a, b in zip(there, common.shape, strict=True)))
                part.tensor.fill(inner, out[slices(common, box.start)])


def _overlap(boxes: list[Region]) -> bool:
    """Whether two boxes share an element: a sweep along the dimension that tells most of them apart."""
    if len(boxes) < 2 or not boxes[0].start:
        return len(boxes) > 1
    dims = range(len(boxes[0].start))
    dim = max(dims, key=lambda d: len({box.start[d] for box in boxes}))
    active: list[Region] = []
    for box in sorted(boxes, key=lambda box: box.start[dim]):
        active = [other for other in active if other.stop[dim] > box.start[dim]]
        if any(not box.intersect(other).empty for other in active):
            return True
        active.append(box)
    return False


class Cut(Lazy):
    """A box of another tensor, without the dimensions in `drop` (of extent 1): a layer of a stack, rows of a table."""

    def __init__(self, tensor: Lazy, box: Region, drop: tuple[int, ...] = ()) -> None:
        self._tensor, self._box, self._drop = tensor, box, drop
        self.dtype = tensor.dtype
        self.shape = tuple(extent for dim, extent in enumerate(box.shape) if dim not in drop)

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        starts, stops = iter(box.start), iter(box.stop)
        first, last = [], []
        for dim, origin in enumerate(self._box.start):
            first.append(origin + (0 if dim in self._drop else next(starts)))
            last.append(origin + (1 if dim in self._drop else next(stops)))
        view = np.expand_dims(out, self._drop) if self._drop else out
        self._tensor.fill(Region(tuple(first), tuple(last)), view)


class Reshaped(Lazy):
    """Another tensor whose row-major elements are seen in another shape: what a box needs is read in blocks of rows."""

    def __init__(self, tensor: Lazy, shape: tuple[int, ...]) -> None:
        if math.prod(shape) != tensor.size:
            raise PiecesMissing(f"a tensor of shape {tensor.shape} does not fit shape {shape}")
        self._tensor, self.dtype, self.shape = tensor, tensor.dtype, shape

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        data = np.empty(box.size, out.dtype)
        at = 0
        for first, last in box.runs(self.shape):
            at = self._run(first, last, data, at)
        out[...] = data.reshape(box.shape)

    def _run(self, first: int, last: int, data: Elements, at: int) -> int:
        """Read elements `[first, last)` of the flattened other one as whole boxes of it."""
        for box in _flat_boxes(self._tensor.shape, first, last):
            self._tensor.fill(box, data[at : at + box.size].reshape(box.shape))
            at += box.size
        return at


def _flat_boxes(shape: tuple[int, ...], first: int, last: int) -> list[Region]:
    """The boxes, in order, that make up elements `[first, last)` of a row-major tensor."""
    if first >= last:
        return []
    if not shape:
        return [Region((), ())]
    row = math.prod(shape[1:])
    low, high = -(-first // row), last // row
    if low > high:  # within one row
        return _prefixed(low - 1, _flat_boxes(shape[1:], first - (low - 1) * row, last - (low - 1) * row))
    found = _prefixed(low - 1, _flat_boxes(shape[1:], first - (low - 1) * row, row)) if first < low * row else []
    if low < high:
        found.append(Region((low, *(0 for _ in shape[1:])), (high, *shape[1:])))
    return found + _prefixed(high, _flat_boxes(shape[1:], 0, last - high * row))


def _prefixed(index: int, boxes: list[Region]) -> list[Region]:
    return [Region((index, *box.start), (index + 1, *box.stop)) for box in boxes]


class Mean(Lazy):
    """The average of tensors of one shape: summed in their order and divided, in the dtype's own arithmetic."""

    def __init__(self, name: str, tensors: Sequence[Lazy]) -> None:
        self._tensors, self.dtype, self.shape = tensors, tensors[0].dtype, tensors[0].shape
        if any((t.dtype, t.shape) != (self.dtype, self.shape) for t in tensors):
            raise PiecesMissing(f"{name}: tensors to average differ in shape or dtype")
        if self.dtype not in ("F32", "F64", "F16", "BF16"):
            raise UnsupportedTensor(f"{name}: tensors of {self.dtype} cannot be averaged")

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        total = to_numbers(self._tensors[0].read(box), self.dtype)
        for tensor in self._tensors[1:]:
            total = total + to_numbers(tensor.read(box), self.dtype)
        mean = total / total.dtype.type(len(self._tensors))
        out[...] = from_numbers(mean, self.dtype).view(carrier(self.dtype)).reshape(box.shape)


class Cast(Lazy):
    """Another tensor in another floating dtype, rounded to nearest, ties to even."""

    def __init__(self, tensor: Lazy, dtype: str) -> None:
        self._tensor, self.dtype, self.shape = tensor, dtype, tensor.shape

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        numbers = to_numbers(self._tensor.read(box), self._tensor.dtype)
        out[...] = from_numbers(numbers, self.dtype).view(carrier(self.dtype)).reshape(box.shape)


CASTS = FLOATS
"""Dtypes between which `Cast` converts."""


def to_numbers(data: Bytes, dtype: str) -> npt.NDArray[np.floating]:
    """Bytes of a floating dtype as numbers: F64 as float64, all others as float32."""
    if dtype == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype not in CASTS:
        raise UnsupportedTensor(f"{dtype} is none of {', '.join(sorted(CASTS))}")
    numbers: npt.NDArray[np.floating] = data.view(NUMPY[dtype])
    return numbers if dtype in ("F32", "F64") else numbers.astype("<f4")


def from_numbers(numbers: npt.NDArray[np.floating], dtype: str) -> Bytes:
    """Round numbers to a floating dtype, to nearest with ties to even; NaN stays NaN."""
    if dtype == "BF16":
        single = numbers.astype("<f4")
        bits = single.view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = np.isnan(single)
        return np.where(nan, (bits >> 16) | 0x40, rounded).astype("<u2").view(np.uint8)
    if dtype not in CASTS:
        raise UnsupportedTensor(f"cannot cast to {dtype}; take one of {', '.join(sorted(CASTS))}")
    with np.errstate(over="ignore"):
        return numbers.astype(NUMPY[dtype]).view(np.uint8)


def number(tensor: Lazy) -> float:
    """Return a tensor of one element as a number."""
    return float(tensor.whole().view(NUMPY[tensor.dtype])[0])


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def slices(box: Region, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    """Index of a box in an array whose first element is at `origin`."""
    base = origin or (0,) * len(box.start)
    return tuple(slice(a - o, b - o) for a, b, o in zip(box.start, box.stop, base, strict=True))
