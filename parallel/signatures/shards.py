"""Shards of a tensor for every rank of a mesh, and back: how the verifier feeds and judges an operation.

Partial sums are terms of both signs; of partial extremes one rank has the value and the others anything beyond it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from collectives.region import split
from parallel.layout import Broadcast, Layout, Partial, Placement, Split

TOLERANCE = 1e-9
"""Of fp64 values, absolute and relative: a sum of few terms of size 1 errs by 1e-15."""


def cut(tensor: Tensor, placement: Placement, parts: int, generator: torch.Generator) -> list[Tensor]:
    """The shards of a tensor along one axis."""
    if isinstance(placement, Split):
        ranges = split(tensor.shape[placement.dim], parts)
        return [tensor.narrow(placement.dim, start, stop - start) for start, stop in ranges]
    if isinstance(placement, Broadcast):
        return [tensor] * parts
    assert isinstance(placement, Partial)
    return _terms(tensor, parts, generator) if placement.op == "sum" else _extremes(tensor, placement, parts, generator)


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return noise.to(tensor.dtype) if tensor.dtype.is_floating_point else (noise * 5).to(tensor.dtype)


def _terms(tensor: Tensor, parts: int, generator: torch.Generator) -> list[Tensor]:
    terms = [_noise(tensor, generator) for _ in range(parts - 1)]
    return [tensor - torch.stack(terms).sum(0) if terms else tensor, *terms]


def _extremes(tensor: Tensor, placement: Partial, parts: int, generator: torch.Generator) -> list[Tensor]:
    owner = torch.randint(parts, tensor.shape, generator=generator)
    sign = -1 if placement.op == "max" else 1
    return [
        torch.where(owner == part, tensor, tensor + sign * _noise(tensor, generator).abs()) for part in range(parts)
    ]


def distribute(tensor: Tensor, layout: Layout, generator: torch.Generator) -> list[Tensor]:
    """The shard of each rank of a mesh of ranks 0, 1, 2..."""
    shards = [tensor]
    for placement, parts in zip(layout.placements, layout.mesh.shape, strict=True):
        shards = [piece for shard in shards for piece in cut(shard, placement, parts, generator)]
    return shards


def joined(pieces: Sequence[Tensor | None], placement: Placement) -> Tensor | None:
    """The tensor that shards along one axis make up; None if they contradict each other or the placement."""
    shards = [piece for piece in pieces if piece is not None]
    if len(shards) < len(pieces):
        return None
    if isinstance(placement, Broadcast):
        return shards[0] if all(_same(shard, shards[0]) for shard in shards) else None
    if isinstance(placement, Split):
        if placement.dim >= shards[0].dim():
            return None
        try:
            whole = torch.cat(list(shards), placement.dim)
        except RuntimeError:
            return None
        sizes = [stop - start for start, stop in split(whole.shape[placement.dim], len(shards))]
        return whole if [shard.shape[placement.dim] for shard in shards] == sizes else None
    assert isinstance(placement, Partial)
    if any(shard.shape != shards[0].shape or shard.dtype == torch.bool or shard.is_complex() for shard in shards):
        return None
    stack = torch.stack(list(shards))
    if placement.op == "sum":
        return stack.sum(0)
    return stack.amax(0) if placement.op == "max" else stack.amin(0)


def assembled(shards: Sequence[Tensor], layout: Layout) -> Tensor | None:
    """The tensor that the shards of all ranks make up; None if they contradict each other or the layout."""
    rest: list[Tensor | None] = list(shards)
    for placement, parts in reversed(list(zip(layout.placements, layout.mesh.shape, strict=True))):
        groups = [rest[at : at + parts] for at in range(0, len(rest), parts)]
        rest = [joined(group, placement) for group in groups]
    return rest[0]


def agrees(shards: Sequence[Tensor], layout: Layout, expected: Tensor) -> bool:
    """Whether the shards of all ranks make up the tensor, with the tolerance that terms of their size need."""
    whole = assembled(shards, layout)
    if whole is None:
        return False
    largest = 0.0
    if Partial() in layout.placements and expected.is_floating_point() and expected.numel():
        largest = max(float(shard.abs().max()) for shard in shards)
    return _same(whole, expected, max(1.0, largest))


def _same(one: Tensor, other: Tensor, scale: float = 1.0) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    kind = torch.complex128 if one.is_complex() else torch.float64
    return bool(torch.allclose(one.to(kind), other.to(kind), rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True))
