"""A tensor as raw bytes: reading, writing in place, and where in memory it lies.

The one place that knows which tensors count as plain data. `collectives.tree` checks with it, `collectives.state`
hashes what it reads, `collectives.assembly` writes with it. Raw bytes are the elements in row-major order, whatever the
strides, as they lie in memory; NaN payloads and the sign of zero are kept.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
"""The dtypes that a state may hold, by name."""
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unfit(tensor: Tensor) -> str | None:
    """Why the tensor is not plain data on the CPU, as words that complete "the tensor ..."; None if it is."""
    if type(tensor) not in _PLAIN_TYPES:
        return f"is a {type(tensor).__qualname__}; give the plain tensor of the local values"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; give its dense parts"
    if tensor.device.type != "cpu":
        return f"is on device {tensor.device}; move it to the CPU"
    if tensor.dtype not in NAMES:
        return f"has dtype {tensor.dtype}; give its raw values as an integer tensor"
    return None


def read(tensor: Tensor) -> Bytes:
    """The raw bytes, flat: a view of the tensor's memory if it is contiguous, else of a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = _words(plain).contiguous().reshape(-1)
    # Of one element or none every stride counts as contiguous, but only a stride of 1 can be viewed as bytes.
    data: Bytes = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
    return data


def write(tensor: Tensor, pieces: Iterable[tuple[int, Bytes]]) -> None:
    """Overwrite raw bytes in place: each piece from its start, in bytes. Also for leaves that require grad.

    A tensor that is not contiguous takes a contiguous copy of itself meanwhile.

    Raises:
        RuntimeError: several elements share one place in memory (see `fillable`).

    """
    if tensor.numel() == 0:
        return
    target = tensor.detach()
    direct = target.is_contiguous() and not target.is_conj() and not target.is_neg()
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        flat = torch.from_numpy(read(tensor) if direct else read(tensor).copy())
        for start, data in pieces:
            flat[start : start + len(data)].copy_(torch.from_numpy(data))
        if direct:
            torch.autograd.graph.increment_version(tensor)
        elif target.is_complex() or target.is_neg():
            target.copy_(flat.view(target.dtype).reshape(target.shape))  # undoes signs that are only noted
        else:
            words = _words(target)
            words.copy_(flat.view(words.dtype).reshape(words.shape))


def fillable(tensor: Tensor) -> bool:
    """Whether no two elements can share a place in memory; an expanded tensor, for one, cannot be written."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return tensor.numel() == 0
            reach += stride * (size - 1)
    return True


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses `[first, last)` between which the tensor's elements lie; gaps are counted in."""
    if tensor.numel() == 0:
        return (tensor.data_ptr(), tensor.data_ptr())
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size())


def create(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A new contiguous tensor; its values are undefined."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=DTYPES[dtype])


def _words(tensor: Tensor) -> Tensor:
    """The same elements as integers of the same width, so that copying strides cannot touch a bit."""
    if tensor.is_complex():
        return tensor
    return tensor.view(_SAME_WIDTH[tensor.element_size()])
