"""What each member puts into each operation, so that every element of a sum can be checked exactly.

A contribution follows from (member, operation, index) alone. Integer sums wrap and so are exact in any order; the
values mix the index with the member in a way that is not linear, so a chunk that lands elsewhere, counts twice or is
missing shows, whatever the others add to it.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST, LARGEST = 1 << 10, 16 << 20
"""Bytes of an operation."""
DTYPES = (torch.int64, torch.int32)
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


class Shape(NamedTuple):
    """What operation `number` of a run reduces, and how."""

    elements: int
    dtype: torch.dtype
    algorithm: str


def shape_of(seed: int, number: int) -> Shape:
    """Sizes are log-uniform from SMALLEST to LARGEST; the same on every member."""
    rng = random.Random(f"{seed}/{number}")
    dtype = rng.choice(DTYPES)
    size = SMALLEST * (LARGEST / SMALLEST) ** rng.random()
    algorithms = ("auto", "auto", "ring", "bidirectional", "doubling" if size < 1 << 20 else "auto")
    return Shape(max(1, int(size) // dtype.itemsize), dtype, rng.choice(algorithms))


class Contributions:
    """Makes contributions and sums of them; keeps the memory for that, all of it touched from the start."""

    def __init__(self) -> None:
        ramp = torch.arange(LARGEST // 4, dtype=torch.int64).mul_(_ODD)
        self._ramp = {dtype: ramp[: LARGEST // dtype.itemsize].to(dtype, copy=True) for dtype in DTYPES}
        self._one, self._sum, self._scratch = (
            {dtype: torch.zeros(LARGEST // dtype.itemsize, dtype=dtype) for dtype in DTYPES} for _ in range(3)
        )

    def fill(self, target: Tensor, member: int, number: int) -> None:
        """Write what `member` contributes to operation `number`."""
        bits = target.dtype.itemsize * 8
        start = random.Random(f"{member}/{number}").getrandbits(bits) - (1 << (bits - 1))
        torch.add(self._ramp[target.dtype][: target.numel()], start, out=target)
        scratch = self._scratch[target.dtype][: target.numel()]
        torch.bitwise_right_shift(target, bits // 2 - 3, out=scratch)
        target ^= scratch

    def one(self, shape: Shape, member: int, number: int) -> Tensor:
        """The contribution of a member, in memory that the next call uses again."""
        target = self._one[shape.dtype][: shape.elements]
        self.fill(target, member, number)
        return target

    def total(self, shape: Shape, members: Sequence[int], number: int) -> Tensor:
        """The sum of the contributions of `members`, in memory that the next call uses again."""
        total = self._sum[shape.dtype][: shape.elements].zero_()
        for member in members:
            total += self.one(shape, member, number)
        return total
