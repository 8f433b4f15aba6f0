"""Which tensors of two checkpoints differ, and by how much, whatever their formats and layouts.

Tensors are compared whole, block by block, by their keys `NAME|STATE`. A weight that one checkpoint has under another
state (the 16-bit parameter beside a master here, the master alone there) is compared with the other's weight, in the
less exact dtype of the two; a tied name with its owner. Memory: two blocks. Called by `ringhold ckpt diff`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.dtypes import FLOATS, NUMPY, itemsize
from checkpoint.lazy import from_numbers, to_numbers
from checkpoint.source import FP32, WEIGHTS, Bytes, Entry, Group, Source, blocks, states_by_name

_EXACTNESS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that differs.

    `kind`: "only in A", "only in B", "shape", "dtype", or "values": then `count` of `elements` differ, by at most
    `max_abs` and, in relation to the larger of the two magnitudes, `max_rel` (None where the dtype has no numbers).
    `detail` says what of the other kinds.
    """

    key: str
    kind: str
    detail: str = ""
    elements: int = 0
    count: int = 0
    max_abs: float | None = None
    max_rel: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of `compared` tensors those in `tensors` differ, or are in one checkpoint only; `groups` says what of groups."""

    compared: int
    tensors: tuple[Difference, ...]
    groups: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.tensors and not self.groups

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is no number in JSON (nan, infinity) is a string."""
        rows = [{key: _jsonable(value) for key, value in asdict(one).items()} for one in self.tensors]
        return {"equal": self.equal, "compared": self.compared, "differences": rows, "groups": list(self.groups)}


def compare(a: Source, b: Source, tolerance: float | None = None) -> Comparison:
    """Compare two open checkpoints.

    Args:
        a, b: the checkpoints.
        tolerance: None: bits must be equal, and dtypes. A number T: elements x and y are equal if
            `|x - y| <= T * max(1, |x|, |y|)`, whatever the dtypes; two NaN are equal.

    Raises:
        CorruptFile, CorruptChunk: a tensor cannot be read.

    """
    found: list[Difference] = []
    compared = 0
    for key, one, other, rounded in _matched(a, b):
        if one is None or other is None:
            found.append(Difference(key, "only in B" if one is None else "only in A"))
            continue
        compared += 1
        if one.shape != other.shape:
            found.append(Difference(key, "shape", f"{list(one.shape)} and {list(other.shape)}"))
        elif one.dtype != other.dtype and not rounded and tolerance is None:
            found.append(Difference(key, "dtype", f"{one.dtype} and {other.dtype}"))
        elif (values := _values(a, one, b, other, key, tolerance)) is not None:
            found.append(values)
    return Comparison(compared, tuple(found), tuple(_groups(a.groups, b.groups)))


def _matched(a: Source, b: Source) -> Iterator[tuple[str, Entry | None, Entry | None, bool]]:
    """Every key of either, with what is to be compared, and whether one may be the other rounded.

    It may if only one of the checkpoints keeps masters beside the parameters.
    """
    left, right = _owned(a), _owned(b)
    for name in dict.fromkeys((*left, *right)):
        mine, theirs = left.get(name, {}), right.get(name, {})
        for state in dict.fromkeys((*mine, *theirs)):
            one, other = _counterpart(mine, state), _counterpart(theirs, state)
            elsewhere = one is not None and other is not None and one.state != other.state
            rounded = elsewhere or (state in WEIGHTS and (FP32 in mine) != (FP32 in theirs))
            yield f"{name}|{state}", one, other, rounded


def _owned(source: Source) -> dict[str, dict[str, Entry]]:
    """States by name; a tied name without tensors of its own has its owner's weight."""
    found = states_by_name(source)
    for owner, *others in source.extras.get("tied", ()):
        weights = {state: entry for state, entry in found.get(owner, {}).items() if state in WEIGHTS}
        for other in others:
            found.setdefault(other, weights)
    return found


def _counterpart(states: Mapping[str, Entry], state: str) -> Entry | None:
    """The tensor of a state; for a weight, the most exact one there is if that state is missing."""
    if state in states or state not in WEIGHTS:
        return states.get(state)
    return next((states[other] for other in WEIGHTS if other in states), None)


def _values(a: Source, one: Entry, b: Source, other: Entry, key: str, tolerance: float | None) -> Difference | None:
    """Compare two tensors of one shape; None if they are equal."""
    if one.dtype != other.dtype and not {one.dtype, other.dtype} <= FLOATS:
        return Difference(key, "dtype", f"{one.dtype} and {other.dtype}")
    count, numbers = 0, one.dtype in NUMPY or one.dtype in FLOATS
    max_abs = max_rel = 0.0
    for box in blocks(one if itemsize(one.dtype) >= itemsize(other.dtype) else other):
        x, y = a.read(one.key, box), b.read(other.key, box)
        dtype = one.dtype
        if dtype != other.dtype:
            x, y, dtype = _alike(x, one.dtype, y, other.dtype, tolerance)
        if np.array_equal(x, y):
            continue
        unequal = _bits(x, dtype) != _bits(y, dtype)
        if numbers:
            absolute, relative, beyond = _distance(_numbers(x, dtype), _numbers(y, dtype), tolerance)
            unequal = unequal if tolerance is None else beyond
            if unequal.any():
                max_abs = max(max_abs, float(absolute[unequal].max()))
                max_rel = max(max_rel, float(relative[unequal].max()))
        count += int(np.count_nonzero(unequal))
    if not count:
        return None
    size = math.prod(one.shape)
    return Difference(key, "values", "", size, count, max_abs if numbers else None, max_rel if numbers else None)


def _alike(x: Bytes, a: str, y: Bytes, b: str, tolerance: float | None) -> tuple[Bytes, Bytes, str]:
    """Two blocks in one dtype: the less exact of theirs, or with a tolerance F64."""
    dtype = max(a, b, key=_EXACTNESS.index) if tolerance is None else "F64"
    return from_numbers(to_numbers(x, a), dtype), from_numbers(to_numbers(y, b), dtype), dtype


def _bits(data: Bytes, dtype: str) -> npt.NDArray[Any]:
    """One value an element, equal if the bits are."""
    width = itemsize(dtype)
    return data.view(f"<u{width}") if width <= 8 else data.view(f"V{width}")


def _numbers(data: Bytes, dtype: str) -> npt.NDArray[Any]:
    if dtype in FLOATS:
        return to_numbers(data, dtype).astype("<f8")
    numbers = data.view(NUMPY[dtype])
    return numbers if dtype.startswith("C") else numbers.astype("<f8")


def _distance(
    x: npt.NDArray[Any], y: npt.NDArray[Any], tolerance: float | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """How far elements are apart, also in relation to the larger, and which are further than the tolerance allows."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        absolute = np.abs(x - y).astype("<f8")
        larger = np.maximum(np.abs(x), np.abs(y)).astype("<f8")
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        absolute = np.where(same, 0.0, np.where(np.isnan(absolute), np.inf, absolute))
        relative = np.where(absolute == 0.0, 0.0, np.where(larger > 0, absolute / larger, np.inf))
        relative = np.where(np.isnan(relative), np.inf, relative)
        beyond = absolute > (tolerance or 0.0) * np.maximum(1.0, np.where(np.isfinite(larger), larger, 1.0))
    return absolute, relative, beyond


def _groups(a: Sequence[Group], b: Sequence[Group]) -> Iterator[str]:
    """What differs between the parameter groups, if both checkpoints have some."""
    if not a or not b:
        return
    if len(a) != len(b):
        yield f"A has {len(a)} groups, B has {len(b)}"
        return
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        if strangers := sorted(set(one.names) ^ set(other.names)):
            yield f"group {number}: {strangers[0]!r} is in one only ({len(strangers)} such names)"
        for key in sorted(one.options.keys() & other.options.keys()):
            x, y = (list(v) if isinstance(v, tuple) else v for v in (one.options[key], other.options[key]))
            if x != y:
                yield f"group {number}: {key} is {x!r} in A, {y!r} in B"


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
