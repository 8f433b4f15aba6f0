"""Where the cells of a shard lie in its memory. Called by `reshard`, to send from there and to put there what came."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from collectives.region import Region
from parallel.layout import Shard, shared

Slices: TypeAlias = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Elements `[start, stop)` of a shard's memory."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def take(self, shard: Tensor) -> Tensor:
        """The elements, flat, in place."""
        return shard.reshape(-1)[self.start : self.stop]

    def copy(self, shard: Tensor, out: Tensor) -> None:
        """Copy the elements into flat memory."""
        out.copy_(self.take(shard))

    def put(self, shard: Tensor, values: Tensor) -> None:
        """Write the elements, given flat."""
        shard.view(-1)[self.start : self.stop] = values


@dataclass(frozen=True, slots=True)
class Box:
    """Elements `[start, stop)`, in row-major order, of a box of a shard."""

    slices: Slices
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def take(self, shard: Tensor) -> Tensor:
        """The elements, flat, as a copy."""
        return shard[self.slices].reshape(-1)[self.start : self.stop]

    def copy(self, shard: Tensor, out: Tensor) -> None:
        """Copy the elements into flat memory."""
        whole = shard[self.slices]
        if self.size == whole.numel():
            out.view(self.shape).copy_(whole)
        else:
            out.copy_(whole.reshape(-1)[self.start : self.stop])

    def put(self, shard: Tensor, values: Tensor) -> None:
        """Write the elements, which are all of the box, given flat."""
        shard[self.slices] = values.view(self.shape)


Part: TypeAlias = Span | Box


def parts(shard: Shard, other: Shard, shape: tuple[int, ...], start: int, stop: int) -> tuple[Part, ...]:
    """Where elements `[start, stop)` of what two shards have in common lie in the memory of the first.

    `shape` is that of the whole tensor. Elements are counted in the order of the flattened tensor.
    """
    if shard.whole and other.whole:
        common = shard.box.intersect(other.box)
        first = tuple(a - b for a, b in zip(common.start, shard.box.start, strict=True))
        inside = Region(first, tuple(a + b for a, b in zip(first, common.shape, strict=True)))
        runs = inside.runs(shard.box.shape)
        if len(runs) == 1:
            return (Span(runs[0][0] + start, runs[0][0] + stop),)
        slices = tuple(slice(a, b) for a, b in zip(inside.start, inside.stop, strict=True))
        return (Box(slices, inside.shape, start, stop),)
    found, passed = list[Part](), 0
    for at, _, length in shared(shard.runs(shape), other.runs(shape)):
        low, high = max(start - passed, 0), min(stop - passed, length)
        if low < high:
            found.append(Span(at + low, at + high))
        passed += length
    return tuple(found)


def joined(found: Iterable[Part]) -> tuple[Part, ...]:
    """The same with neighbours as one."""
    made: list[Part] = []
    for part in found:
        last = made[-1] if made else None
        if isinstance(part, Span) and isinstance(last, Span) and last.stop == part.start:
            made[-1] = Span(last.start, part.stop)
        elif isinstance(part, Box) and isinstance(last, Box) and last.slices == part.slices and last.stop == part.start:
            made[-1] = Box(part.slices, part.shape, last.start, part.stop)
        else:
            made.append(part)
    return tuple(made)


def gather(shard: Tensor, found: tuple[Part, ...]) -> Tensor:
    """The elements of the parts, one behind the other: in place where they are so in memory."""
    if len(found) == 1:
        return found[0].take(shard)
    values, at = shard.new_empty(sum(part.size for part in found)), 0
    for part in found:
        part.copy(shard, values[at : at + part.size])
        at += part.size
    return values


def scatter(values: Tensor, found: tuple[Part, ...], shape: tuple[int, ...], fill: float) -> Tensor:
    """A shard of this shape with these values in these parts, and `fill` in the rest: the memory of `values` itself
    where they are all of it in order."""
    size = torch.Size(shape).numel()
    if found == (Span(0, size),):
        return values.view(shape)
    covered = sum(part.size for part in found) == size
    shard = values.new_empty(shape) if covered else values.new_full(shape, fill)
    at = 0
    for part in found:
        part.put(shard, values[at : at + part.size])
        at += part.size
    return shard
