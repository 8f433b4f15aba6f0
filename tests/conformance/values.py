"""Inputs that every process can make for every rank, and what a collective must make of them, by plain arithmetic.

*Exact* values are such that the reduction has one right answer to the bit, in whatever order it is done: integers wrap
around, floats are few binary digits wide, so that single precision holds every partial result; half precision is the
single precision result rounded once. *Rough* values are normal random numbers: compared with double precision.
"""

import torch
from torch import Tensor

DTYPES = ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64")
OPS = ("sum", "avg", "min", "max", "prod")
HALF = (torch.float16, torch.bfloat16)


def exact(rank: int, shape: list[int], dtype: torch.dtype, op: str, seed: int) -> Tensor:
    """What `rank` contributes."""
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64).to(dtype)
    if op == "prod":
        return torch.tensor([0.5, -1.0, 1.0, -2.0, 3.0])[torch.randint(5, shape, generator=generator)].to(dtype)
    digits = 8 if dtype == torch.bfloat16 else 11
    whole = torch.randint(-(2**digits) + 1, 2**digits, shape, generator=generator)
    return (whole / 64).to(dtype)


def rough(rank: int, shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """What `rank` contributes where there is no one right answer."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1013 + rank), dtype=torch.float64).to(
        dtype
    )


def reduced(inputs: list[Tensor], op: str) -> Tensor:
    """The reduction of exact inputs, in their dtype."""
    dtype = inputs[0].dtype
    wide = torch.stack(inputs).to(torch.float64 if dtype.is_floating_point else torch.int64)
    if op in ("min", "max"):
        return (wide.amin(0) if op == "min" else wide.amax(0)).to(dtype)
    if op == "prod":
        return wide.prod(0).to(dtype)
    total = wide.sum(0)
    if op == "avg":
        single = torch.float64 if dtype == torch.float64 else torch.float32
        return (total.to(single) / len(inputs)).to(dtype)
    return total.to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides, or as a leaf that requires grad."""
    if layout == "strided":
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
        strided = wide[..., ::2]
        strided.copy_(tensor)
        return strided
    if layout == "transposed":
        return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "leaf":
        return tensor.clone().requires_grad_()
    assert layout == "contiguous", layout
    return tensor.clone()
