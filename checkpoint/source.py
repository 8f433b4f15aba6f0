"""What readers of checkpoints give and writers of checkpoints take: named tensors, whole, read a box at a time.

A reader (`checkpoint.formats.read_*`) finds out where the pieces of every tensor lie and answers `read`; a writer
(`checkpoint.formats.write_*`) asks for boxes of bounded size and never sees how the source was sharded. Nothing here
imports torch, and no reader holds more than a few buffers of `BLOCK_BYTES`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.dtypes import itemsize
from collectives.region import Region

Bytes: TypeAlias = npt.NDArray[np.uint8]

BLOCK_BYTES = 4 << 20
"""Bytes that `blocks` cuts a tensor into: large enough for few calls, small enough for many buffers at once."""

PARAM, FP32, FROZEN, STEP = "param", "fp32", "frozen", "step"
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
WEIGHTS = (FP32, PARAM, FROZEN)
"""States that hold a tensor of the model, the most exact first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a training state: full, unsharded, unpadded, row-major.

    `state` is one of `param` (a tensor of the model as it is stored: a 16-bit parameter beside its master, a buffer),
    `fp32` (the weight that the optimizer steps: the master, or the parameter itself where the model is in fp32),
    `frozen` (a parameter that no optimizer steps), `exp_avg`, `exp_avg_sq`, `step` (a scalar of no dimensions), or any
    other name that the optimizer gives to a state of a parameter (`momentum_buffer`, `max_exp_avg_sq`...).
    `dtype` is a name of `checkpoint.dtypes`: "F32", "BF16", "I64"...
    """

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """`NAME|STATE`, unique in a source."""
        return f"{self.name}|{self.state}"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Group:
    """One parameter group of the optimizer: names of its parameters, in order, and hyperparameters as JSON values.

    `options` has the optimizer's own words (`lr`, `betas`, `eps`, `weight_decay`...), without `params`.
    """

    names: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A checkpoint that is open for reading.

    `extras` holds JSON values besides the tensors; keys that readers agree on: `iteration` (int), `scheduler`, `rng`,
    `args` (settings of the job that wrote it), `tied` (lists of names that share one tensor, the owner first: the
    others may have entries too, of the same bytes, and writers that keep one name keep the first),
    `universal_checkpoint_info`, `client_state`, `layout` (sizes of the axes that wrote it). Bytes are
    `{"base64": "..."}`. What has no JSON form is left out and named in `extras["left_out"]`.
    """

    format: str

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Tensors by key, in the order of the model."""
        ...

    @property
    def groups(self) -> Sequence[Group]:
        """Parameter groups of the optimizer, in its order; none without an optimizer."""
        ...

    @property
    def extras(self) -> Mapping[str, Any]:
        """All that is no tensor (see above)."""
        ...

    def read(self, key: str, box: Region) -> Bytes:
        """Raw little-endian row-major bytes of a box of a tensor; the caller may keep and change them.

        Thread-safe. Memory: the result and a few times `BLOCK_BYTES`, so callers ask for boxes of bounded size.

        Raises:
            UsageError: the box does not lie within the tensor.
            CorruptFile: the bytes are not there, or not what the checkpoint says.

        """
        ...

    def close(self) -> None:
        """Close every file. Nothing may be read afterwards."""
        ...


def blocks(entry: Entry, limit: int = BLOCK_BYTES) -> Iterator[Region]:
    """Cut a tensor into boxes of at most `limit` bytes that follow each other in row-major order without gaps.

    Writing `read(key, box)` of each, one behind the other, writes the whole tensor. An empty tensor has none.
    """
    yield from _blocks(entry.shape, max(1, limit // itemsize(entry.dtype)))


def _blocks(shape: tuple[int, ...], limit: int) -> Iterator[Region]:
    if math.prod(shape) <= limit:
        if 0 not in shape:
            yield Region.whole(shape)
        return
    row = math.prod(shape[1:])
    if row <= limit:
        rows = limit // row
        rest = shape[1:]
        for first in range(0, shape[0], rows):
            yield Region((first, *(0 for _ in rest)), (min(first + rows, shape[0]), *rest))
        return
    inner = list(_blocks(shape[1:], limit))
    for index in range(shape[0]):
        for box in inner:
            yield Region((index, *box.start), (index + 1, *box.stop))


def weight_key(source: Source, name: str) -> str | None:
    """The key of the most exact copy of a model tensor: master, else as stored, else frozen; None if it has none."""
    return next((key for state in WEIGHTS if (key := f"{name}|{state}") in source.entries), None)


def states_by_name(source: Source) -> dict[str, dict[str, Entry]]:
    """Entries grouped: name -> state -> entry, in the order of the source."""
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in source.entries.values():
        found[entry.name][entry.state] = entry
    return dict(found)
