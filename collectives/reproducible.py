"""Sums with one bit pattern, whoever adds them up: exact accumulators for `all_reduce(..., reproducible=True)`.

Called by `collectives.operations`. The result for an element is a function of the multiset of its contributions alone:
not of how they are spread over members, of the members' number or order, or of who adds what first. The method is the
indexed summation of Demmel and Nguyen ("Parallel Reproducible Summation", IEEE Trans. Computers 64, 2015) with
integers:

- The exponents are cut into bins of `WIDTH` bits at fixed places. A number is split at the bins' boundaries into
  integer digits, towards zero, which are the same wherever the splitting starts.
- An accumulator keeps the digits of the highest bin that has any, and of the bins right below it: `LIMBS` in all,
  summed as int64. What lies lower is dropped; that depends on the highest bin of all contributions only, because
  whoever has a lower one drops those limbs when accumulators meet. Adding integers has no order.
- A limb has room for the digits of `MOST` contributions. At the end the limbs become one floating-point number, once.

Accuracy for n contributions x to an element: off by less than n * 2**-46 * max|x| (fp32, and fp16 and bf16, which are
summed as fp32) or n * 2**-92 * max|x| (fp64), and by half a unit in the last place (and 2**-20 of one) of the result's
rounding. An average is the fp64 sum divided by n and, for fp32, rounded to fp32. Infinities and NaNs give what IEEE
754 says of their sum in any order, the NaN being torch's; a zero is +0.

A block of b elements travels as a record of 8 + b + 16 b bytes (fp32; 24 b for fp64) and comes back as 8 + 4 b (8 b).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 2**16
"""Contributions to a sum, over all members."""
WIDTH = 46
"""Bits of a bin. Digits of `MOST` contributions need 16 more, and carries and sign the other two of an int64."""
BLOCK = 1024
"""Elements of a block, but for tensors that have fewer."""

_SPECIAL = 255
"""As the bin of an element: a contribution is infinite or NaN. The first limb counts these, +inf, -inf and NaN. 0 says
that all contributions are zeros; so bins are numbered from 1."""
_COUNTS = (0, 20, 40)
"""At which bit of the limb the three counts begin."""
_EXACT = 2**7
"""So many digits add up to less than 2**53, which fp64 holds exactly."""
_TILE = 2**16
"""Elements that are worked on at once, about; they stay in the cache."""


@dataclass(frozen=True, slots=True)
class Accumulator:
    """How blocks of one floating-point format become records, are added, and become numbers again."""

    dtype: torch.dtype
    """fp32 or fp64."""
    block: int
    """Elements of a block; divisible by 8."""
    limbs: int
    mantissa: int
    """Bits of the fraction, where the exponent begins."""
    lowest: int
    """Bin 1 begins at 2**-lowest; all normal numbers lie in a bin, and subnormal ones reach below it."""

    @property
    def up(self) -> int:
        """Bytes of a record of contributions: their number, the bin of each element, the limbs."""
        return 8 + self.block + 8 * self.limbs * self.block

    @property
    def down(self) -> int:
        """Bytes of a record of a result: the number of contributions, and the values."""
        return 8 + self.dtype.itemsize * self.block

    def blocks(self, count: int) -> int:
        """Records that `count` elements need."""
        return -(-count // self.block)

    def encode(self, contributions: Sequence[Tensor], count: int, records: Tensor) -> None:
        """Accumulate flat tensors of `count` elements into flat uint8 `records` (blocks * up,); of none, too."""
        rows = records.view(-1, self.up)
        step = max(1, _TILE // self.block)
        for first in range(0, len(rows), step):
            tile = rows[first : first + step]
            parts = [self._blocks(one, first, len(tile)) for one in contributions]
            tile.view(torch.int64)[:, 0] = len(parts)
            if parts:
                self._accumulate(parts, self._bins(tile), self._digits(tile))
            else:
                tile[:, 8:] = 0

    def combine(self, slots: Tensor, average: bool) -> Tensor:
        """Add the records (members, b, up) uint8 and return those of the result, (b, down).

        With `average` divide by the number of contributions; of none that gives NaN.
        """
        made = slots.new_empty(slots.shape[1], self.down)
        step = max(1, _TILE // self.block)
        for first in range(0, slots.shape[1], step):
            part = slots[:, first : first + step]
            count = part.view(torch.int64)[:, :, 0].sum(0)
            values = self._value(*self._add(part), count, average)
            tile = made[first : first + step]
            tile.view(torch.int64)[:, 0] = count
            tile.view(self.dtype)[:, 8 // self.dtype.itemsize :] = values
        return made

    def decode(self, records: Tensor, values: Tensor) -> int:
        """Write the values of a result's flat `records` into flat `values` (n,); return the number of contributions."""
        rows = records.view(-1, self.down)
        found = rows.view(self.dtype)[:, 8 // self.dtype.itemsize :]
        whole, rest = divmod(values.numel(), self.block)
        values[: whole * self.block].view(whole, self.block).copy_(found[:whole])
        if rest:
            values[whole * self.block :] = found[whole, :rest]
        return int(rows.view(torch.int64)[0, 0])

    def _blocks(self, values: Tensor, first: int, number: int) -> Tensor:
        """Some blocks of a flat tensor as (number, block), filled up with zeros, in the accumulator's dtype."""
        part = values[first * self.block : (first + number) * self.block].to(self.dtype)
        missing = number * self.block - part.numel()
        return torch.cat((part, part.new_zeros(missing))).view(number, -1) if missing else part.view(number, -1)

    def _bins(self, rows: Tensor) -> Tensor:
        """The bins (..., b, block) uint8 in records (..., b, up)."""
        return rows[..., 8 : 8 + self.block]

    def _digits(self, rows: Tensor) -> list[Tensor]:
        """The limbs in records (..., b, up), highest first, each (..., b, block) int64."""
        words = rows.view(torch.int64)[..., 1 + self.block // 8 :]
        return [words[..., limb * self.block : (limb + 1) * self.block] for limb in range(self.limbs)]

    def _accumulate(self, parts: Sequence[Tensor], bins: Tensor, limbs: Sequence[Tensor]) -> None:
        """Split tensors (b, block) into the limbs of the bin that is highest for each element."""
        magnitude = parts[0].abs().view(self._words)
        for part in parts[1:]:
            magnitude = torch.maximum(magnitude, part.abs().view(self._words))
        filled = magnitude > 0
        most = magnitude.amax()
        least = torch.where(filled, magnitude, most).amin()
        highest = self._bin(most)
        if highest == self._bin(least) and highest < _SPECIAL:
            bins.copy_(filled).mul_(highest)
            self._split(parts, self._place(highest).neg_(), limbs)
            return
        bin_ = torch.where(filled, self._bin(magnitude), 0)
        bins.copy_(bin_)
        special = bin_ == _SPECIAL
        place = self._place(torch.where(special, 1, bin_)).neg_()
        self._split([torch.where(special, 0.0, part) for part in parts], place, limbs)
        for part in parts:
            limbs[0].add_(torch.where(special, _counted(part), 0))

    def _split(self, parts: Sequence[Tensor], exponent: Tensor, limbs: Sequence[Tensor]) -> None:
        """Write the sums of the digits of `parts` * 2**exponent to the limbs."""
        for first in range(0, len(parts), _EXACT):
            sums: list[Tensor] = []
            for part in parts[first : first + _EXACT]:
                digits = self._digits_of(part, exponent)
                sums = [total.add_(digit) for total, digit in zip(sums, digits, strict=True)] if sums else digits
            for limb, total in zip(limbs, sums, strict=True):
                if first:
                    limb.add_(total.to(torch.int64))
                else:
                    limb.copy_(total)

    def _digits_of(self, part: Tensor, exponent: Tensor) -> list[Tensor]:
        """The digits of `part` * 2**exponent, fp64, the highest first."""
        rest = self._scaled(part.to(torch.float64, copy=True), exponent)
        digits = []
        for _ in range(self.limbs - 1):
            digits.append(rest.trunc())
            rest.sub_(digits[-1]).mul_(2.0**WIDTH)
        return [*digits, rest.trunc_()]

    def _add(self, slots: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Add accumulators (members, b, up): their highest bins, (b, block) or one for all, and limbs (b, block)."""
        bins = self._bins(slots)
        highest = bins.amax()
        if highest < _SPECIAL and (bins - 1).amin() >= highest - 1:  # 0 wraps around: it is of no bin
            return highest, [_sum(digits) for digits in self._digits(slots)]
        top = bins.amax(0)
        total = [torch.zeros(top.shape, dtype=torch.int64) for _ in range(self.limbs)]
        for member, row in enumerate(slots):
            lower = top - bins[member]
            for shift in range(self.limbs):
                for limb, digit in zip(total[shift:], self._digits(row), strict=False):
                    limb.add_(torch.where(lower == shift, digit, 0))
        return top, total

    def _value(self, top: Tensor, limbs: list[Tensor], count: Tensor, average: bool) -> Tensor:
        """The accumulators of `count` (b,) contributions as numbers (b, block)."""
        special = top == _SPECIAL
        odd = _uncounted(limbs[0]) if special.any() else None
        if self.limbs > 2 or count.amax() > _EXACT:  # else fp64 holds both limbs, and their sum is rounded once
            for high, low in zip(limbs[-2::-1], limbs[:0:-1], strict=True):
                carry = low + (1 << WIDTH - 1) >> WIDTH  # to digits of least magnitude: adding them cancels nothing
                low.sub_(carry << WIDTH)
                high.add_(carry)
        value = limbs[-1].to(torch.float64)
        for limb in reversed(limbs[:-1]):
            value.mul_(2.0**-WIDTH).add_(limb)
        if average:
            value.div_(count.unsqueeze(1))
        if odd is None:
            return self._scaled(value, self._place(top)).to(self.dtype)
        finite = self._scaled(value, self._place(torch.where(special, 1, top)))
        return torch.where(special, odd, finite).to(self.dtype)

    def _bin(self, magnitude: Tensor) -> Tensor:
        """The bin of each number that is not zero, given its bits without the sign; 255 for infinities and NaNs."""
        exponent = magnitude >> self.mantissa
        bin_ = (exponent.clamp(min=1) + (self.lowest - self._bias)) * _RECIPROCAL >> _SHIFT
        return torch.where(exponent > self._bias << 1, _SPECIAL, bin_ + 1)

    def _place(self, bin_: Tensor) -> Tensor:
        """The exponent of the unit of a bin's highest digit, int64."""
        return (bin_.to(torch.int64) - 1) * WIDTH - self.lowest

    def _scaled(self, values: Tensor, exponent: Tensor) -> Tensor:
        """`values` * 2**`exponent`, in place; in two steps for fp64, where one factor would be out of range."""
        if self.dtype == torch.float64:
            half = exponent >> 1
            values = values.mul_(_power(half))
            exponent = exponent - half
        return values.mul_(_power(exponent))

    @property
    def _words(self) -> torch.dtype:
        """Integers as wide as the format."""
        return torch.int32 if self.dtype == torch.float32 else torch.int64

    @property
    def _bias(self) -> int:
        """Of the format's exponents."""
        return 127 if self.dtype == torch.float32 else 1023


def accumulator(dtype: torch.dtype, count: int) -> Accumulator:
    """Return the accumulator for tensors of `count` elements of fp32, fp64, fp16 or bf16."""
    block = min(BLOCK, max(8, -(-count // 8) * 8))
    if dtype == torch.float64:
        return Accumulator(torch.float64, block, limbs=3, mantissa=52, lowest=1046)
    return Accumulator(torch.float32, block, limbs=2, mantissa=23, lowest=126)


_SHIFT = 20
_RECIPROCAL = -(-(1 << _SHIFT) // WIDTH)
"""Multiplying by it and shifting divides by `WIDTH`; exact for all exponents that occur."""


def _power(exponent: Tensor) -> Tensor:
    """2**exponent in fp64, of int64 between -1022 and 1023."""
    return (exponent + 1023 << 52).view(torch.float64)


def _sum(digits: Tensor) -> Tensor:
    """Add limbs (members, b, block); torch's own sum takes three times as long over so few."""
    if len(digits) == 1:
        return digits[0].clone()
    total = digits[0] + digits[1]
    for more in digits[2:]:
        total.add_(more)
    return total


def _counted(values: Tensor) -> Tensor:
    """What a contribution adds to the first limb where a special bin makes it a count: 0 if it is finite."""
    plus, minus, nan = (1 << bit for bit in _COUNTS)
    counts = torch.where(values == torch.inf, plus, 0) + torch.where(values == -torch.inf, minus, 0)
    return counts + torch.where(values.isnan(), nan, 0)


def _uncounted(counts: Tensor) -> Tensor:
    """The sum of what was counted, fp64."""
    plus, minus, nan = ((counts >> bit) & (1 << _COUNTS[1]) - 1 > 0 for bit in _COUNTS)
    signed = torch.where(plus, torch.inf, -torch.inf).to(torch.float64)
    return torch.where(nan | (plus & minus), torch.nan, signed)
