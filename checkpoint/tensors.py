"""Tensors of torch as bytes: what a checkpoint keeps of one, and boxes of the shard that it holds.

For `checkpoint.saving` and `checkpoint.loading`; raw bytes themselves are the business of `collectives.rawbytes`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint.codec import Bytes
from checkpoint.dtypes import TORCH
from checkpoint.reader import inside
from collectives import rawbytes
from collectives.errors import UsageError
from collectives.region import Region
from parallel.layout import Shard

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TORCH_NAMES = {name: torch_name for torch_name, name in TORCH.items()}


def is_tensor(value: Any) -> bool:
    """Whether a node of a state is a tensor."""
    return isinstance(value, Tensor)


def dtype_of(key: str, tensor: Tensor) -> str:
    """The name of its dtype.

    Raises:
        UsageError: it is no plain tensor whose bits can be kept.

    """
    if why := rawbytes.unfit(tensor):
        raise UsageError(f"the tensor {key!r} {why}")
    return TORCH[rawbytes.NAMES[tensor.dtype]]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch for a name."""
    return rawbytes.DTYPES[_TORCH_NAMES[name]]


class LocalBytes:
    """The raw bytes of the shards of this rank, box by box. For one thread.

    A tensor that is not contiguous is copied whole when it is first asked for; one such copy is kept.
    """

    def __init__(self, tensors: dict[str, Tensor], shards: dict[str, Shard]) -> None:
        self._tensors, self._shards = tensors, shards
        self._key = ""
        self._boxes: list[tuple[Region, Bytes]] = []

    def read(self, key: str, box: Region) -> Bytes:
        """The bytes of a box that lies in one of the shard's boxes, as (*shape, itemsize); perhaps a view."""
        if key != self._key:
            self._boxes = list(_boxes(self._tensors[key], self._shards[key]))
            self._key = key
        for outer, data in self._boxes:
            if outer.contains(box):
                return data[inside(box, outer)]
        raise AssertionError(f"the box {box} of {key!r} is not here")


def _boxes(tensor: Tensor, shard: Shard) -> Iterator[tuple[Region, Bytes]]:
    data, size = rawbytes.read(tensor), tensor.element_size()
    for box, at in shard.boxes():
        yield box, data[at * size : (at + box.size) * size].reshape(*box.shape, size)


def views(tensor: Tensor, shard: Shard) -> Iterator[tuple[Region, Tensor]]:
    """The boxes of a shard as views of the tensor that holds it, each of its box's shape."""
    plain = tensor.detach()
    if shard.whole and plain.shape == shard.box.shape:
        if shard.size:
            yield shard.box, plain
        return
    for box, at in shard.boxes():
        yield box, plain[at : at + box.size].view(box.shape)


def castable(source: str, target: str) -> bool:
    """Whether values of one dtype can be converted to another: from float to float."""
    return torch_dtype(source).is_floating_point and torch_dtype(target).is_floating_point


def put(raw: Bytes, dtype: str, shape: tuple[int, ...], index: tuple[slice, ...], view: Tensor) -> None:
    """Copy `index` of a chunk of this shape to `view`, converting where the dtypes differ."""
    kind = torch_dtype(dtype)
    if raw.ctypes.data % min(kind.itemsize, 8) or not raw.flags.writeable:
        raw = raw.copy()
    source = torch.from_numpy(raw).view(kind).view(shape)[index]
    with torch.no_grad():
        if kind is view.dtype and kind.itemsize in _WORDS and not kind.is_complex and not view.is_neg():
            word = _WORDS[kind.itemsize]  # copied as integers, so that no bit of a NaN can change
            view.view(word).copy_(source.view(word))
        else:
            view.copy_(source)


def changed(tensor: Tensor) -> None:
    """Let autograd know that a tensor was written to."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def reduce(terms: list[Bytes], dtype: str, ops: tuple[str, ...], extents: tuple[int, ...]) -> Bytes:
    """Combine terms of equal shape (*shape, itemsize), an array of `extents` in row-major order, axis by axis.

    In the order of the terms; halves and smaller floats in single precision, once rounded at the end.
    """
    kind = torch_dtype(dtype)
    wide = torch.float32 if kind.is_floating_point and kind.itemsize < 4 else kind
    values = torch.stack([_as_tensor(term, kind).to(wide) for term in terms])
    values = values.reshape(*extents, *values.shape[1:])
    for op in ops:
        values = _REDUCE[op](values)
    flat = values.to(kind).contiguous().reshape(-1)
    return rawbytes.read(flat).reshape(terms[0].shape)


def _average(values: Tensor) -> Tensor:
    total = values.sum(0, dtype=values.dtype)
    exact = total.is_floating_point() or total.is_complex()
    return total / len(values) if exact else torch.div(total, len(values), rounding_mode="trunc")


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(0, dtype=values.dtype),
    "avg": _average,
    "min": lambda values: values.amin(0),
    "max": lambda values: values.amax(0),
    "prod": lambda values: values.prod(0, dtype=values.dtype),
}


def _as_tensor(data: Bytes, kind: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(data)).reshape(-1).view(kind)
