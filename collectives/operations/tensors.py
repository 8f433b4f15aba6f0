"""What operations do with tensors: check those of callers, flatten, hand over and write results."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from collectives.arena import exchange
from collectives.errors import UnsupportedTensor, UsageError
from collectives.staging import copy_out

LONGEST = 200
"""Characters of a header's text that is told in full."""


def check_tensor(kind: str, tensor: Tensor) -> None:
    """Raise `UnsupportedTensor` unless it is a dense CPU tensor."""
    if not isinstance(tensor, Tensor):
        raise UnsupportedTensor(f"{kind} takes a tensor, not {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise UnsupportedTensor(f"{kind} takes CPU tensors; this one is on {tensor.device}: move it with .cpu()")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UnsupportedTensor(f"{kind} takes dense tensors, not layout {tensor.layout}")


def check_out(kind: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise `UsageError` unless `out` can take the result."""
    check_tensor(kind, out)
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise UsageError(f"{kind}: out is {list(out.shape)} {out.dtype}, the result is {list(shape)} {dtype}")


def check_rows(kind: str, tensor: Tensor, parts: int) -> None:
    """Raise `UsageError` unless the tensor can be cut in so many equal parts along its first dimension."""
    if not tensor.dim() or tensor.shape[0] % parts:
        raise UsageError(f"{kind}: shape {list(tensor.shape)} cannot be cut in {parts} equal parts along dim 0")


def check_counts(kind: str, what: str, counts: Sequence[int], length: int, total: int | None = None) -> tuple[int, ...]:
    """Return `counts`, one for each of `length` members, or raise `UsageError`; `total` is what they must add up to."""
    checked = tuple(counts)
    if len(checked) != length or any(not isinstance(count, int) or count < 0 for count in checked):
        raise UsageError(f"{kind}: {what} must be {length} numbers of rows, one for each member, not {list(checked)}")
    if total is not None and sum(checked) != total:
        raise UsageError(f"{kind}: {what} {list(checked)} add up to {sum(checked)}, the tensor has {total} rows")
    return checked


def brief(text: str) -> str:
    """The text, or a digest of a long one: for headers, which only have to differ where the text does."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}... ({hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"


def row_size(tensor: Tensor) -> int:
    """Elements of one row along dim 0, also of a tensor of no rows."""
    return math.prod(tensor.shape[1:])


def flat(tensor: Tensor) -> Tensor:
    """The elements in a row, of stride 1: torch takes any stride for contiguous where there is one element or none."""
    if tensor.dim() == 1 and tensor.stride(0) == 1:
        return tensor
    line = tensor.contiguous().view(-1)
    return line.as_strided((line.numel(),), (1,))


def joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The pieces as one flat tensor: the only one itself, several copied behind each other."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces)) if pieces else torch.empty(0, dtype=dtype)


def handed_over(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The pieces as one flat tensor for the caller to keep: staging itself, unless most of that would be waste."""
    line = joined(pieces, dtype)
    wasteful = line.untyped_storage().nbytes() > 2 * line.nbytes
    return line.to(dtype, copy=wasteful)


def turn_in(pieces: Sequence[Tensor], target: Tensor) -> Tensor:
    """Bring the pieces, which nobody needs any more, into `target` as `write` does, if possible without a copy."""
    if len(pieces) == 1 and pieces[0].dtype == target.dtype and target.is_contiguous():
        line = target.detach().view(-1)
        done = exchange(pieces[0], line) // line.itemsize
        if done:
            torch.autograd.graph.increment_version(target)
            write([pieces[0][done:]], line[done:])
            return target
    return write(pieces, target)


def write(pieces: Sequence[Tensor], target: Tensor) -> Tensor:
    """Copy the pieces into `target`, of any strides and dtype, as its elements in row-major order; returns it."""
    if len(pieces) == 1:
        copy_out(pieces[0], target)
    elif target.is_contiguous():
        line, start = target.detach().view(-1), 0
        for piece in pieces:
            copy_out(piece, line[start : start + piece.numel()])
            start += piece.numel()
    else:
        copy_out(joined(pieces, target.dtype), target)
    return target
