"""Codecs: floating-point numbers as fewer bytes, in blocks that stand alone, for quantized all-reduces.

Called by `collectives.operations` for `all_reduce(..., codec=...)`. A block is `BLOCK` consecutive elements and becomes
a *record* of fixed size, whatever its neighbours are, so the records of a tensor can be cut between any two and do not
depend on how many members share them. The last block is filled up with copies of the tensor's last element.

| codec | a record | bytes an element | step |
| --- | --- | --- | --- |
| int8 | fp32 step, fp32 zero point, 256 codes of 8 bits | 1.03125 | (max - min) / 255 of the block |
| int4 | fp32 step, fp32 zero point, 256 codes of 4 bits | 0.53125 | (max - min) / 15 of the block |
| bf16 | 256 numbers in bfloat16 | 2 | the distance of neighbours in bfloat16, 2**-7 of the value at most |

Decoding is `zero point + code * step` in fp32, each operation rounded by itself: every machine decodes the same bits.
A decoded element is off by at most half a step with rounding "nearest", by less than a step with "stochastic", and by
`SLACK * max|x| + TINY` for the arithmetic itself. Stochastic rounding is unbiased to 2**-16 of a step: the mean over
many keys is the number itself (Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015).

What is not finite is never hidden: with int8 and int4 a block that holds a NaN or an infinity, or whose spread is
beyond `MOST_SPREAD`, decodes to NaN throughout; bf16 keeps NaNs and infinities where they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from collectives.errors import UsageError

BLOCK = 256
"""Elements of a block."""
MOST_SPREAD = 2.0**127
"""Largest max - min of a block of int8 or int4."""
SLACK = 2.0**-22
"""What the fp32 arithmetic of encoding and decoding adds to the error, relative to the block's largest magnitude."""
TINY = 2.0**-140
"""What underflow adds to the error."""
ROUNDINGS = ("nearest", "stochastic")

_TILE = 512
"""Blocks that are worked on at once: 512 KiB in fp32, which stay in the cache."""
_HEADER = 8
"""Bytes of step and zero point."""


class Noise:
    """Random numbers for stochastic rounding: the same key gives the same ones, on every machine (rule R8).

    Args:
        key: non-negative integers, and text last. Of an all-reduce: (number of the part, seq, member, lane).

    """

    def __init__(self, *key: int | str) -> None:
        numbers = [int.from_bytes(part.encode()) if isinstance(part, str) else part for part in key]
        self._bits = np.random.SFC64(np.random.SeedSequence(numbers))

    def take(self, count: int) -> Tensor:
        """Return the next `count` (divisible by 4) uniform 16-bit numbers, as int16."""
        return torch.from_numpy(self._bits.random_raw(count // 4).view(np.int16))


class Codec(ABC):
    """How a block becomes a record and back. Values of it are stateless and shared."""

    name: ClassVar[str]
    record: ClassVar[int]
    """Bytes of a record; divisible by 8."""

    def encode(self, values: Tensor, records: Tensor, noise: Noise | None = None) -> None:
        """Encode flat `values` (n,), any floating dtype, into flat `records` (blocks(n) * record,), uint8.

        With `noise` rounding is stochastic, else to nearest. `records` may start at multiples of 4 bytes.
        """
        for start, stop, rows in _tiles(values.numel(), records, self.record):
            block = values[start:stop].to(torch.float32)
            missing = rows.shape[0] * BLOCK - block.numel()
            if missing:
                block = torch.cat((block, block[-1:].expand(missing)))
            drawn = noise.take(rows.shape[0] * BLOCK).view(-1, BLOCK) if noise is not None else None
            self._encode(block.view(-1, BLOCK), rows, drawn)

    def decode(self, records: Tensor, values: Tensor) -> None:
        """Decode into flat fp32 `values` (n,); the reverse of `encode`."""
        for start, stop, rows in _tiles(values.numel(), records, self.record):
            whole = stop - start == rows.shape[0] * BLOCK
            block = values[start:stop] if whole else torch.empty(rows.shape[0] * BLOCK)
            self._decode(rows, block.view(-1, BLOCK))
            if not whole:
                values[start:stop] = block[: stop - start]

    @abstractmethod
    def _encode(self, values: Tensor, records: Tensor, noise: Tensor | None) -> None:
        """Encode (b, BLOCK) fp32 into (b, record) uint8; `noise` is (b, BLOCK) int16."""

    @abstractmethod
    def _decode(self, records: Tensor, values: Tensor) -> None:
        """The reverse, into `values`."""


class _Affine(Codec):
    """Codes on a grid of equal steps from the block's minimum to its maximum."""

    levels: ClassVar[int]

    def _encode(self, values: Tensor, records: Tensor, noise: Tensor | None) -> None:
        zero = values.amin(1, keepdim=True)
        spread = values.amax(1, keepdim=True) - zero
        fine = spread <= MOST_SPREAD
        if not fine.all():
            values = torch.where(fine, values, 0.0)
            zero, spread = torch.where(fine, zero, torch.nan), torch.where(fine, spread, 0.0)
        step = spread / (self.levels - 1)
        header = _header(records)
        header[:, 0:1], header[:, 1:2] = step, zero
        scaled = (values - zero.nan_to_num()).div_(torch.where(step > 0, step, 1.0))
        if noise is None:
            scaled.round_()
        else:
            scaled.add_(noise.to(torch.float32).mul_(2.0**-16).add_(0.5)).floor_()
        self._pack(scaled.clamp_(max=self.levels - 1), records[:, _HEADER:])

    def _decode(self, records: Tensor, values: Tensor) -> None:
        header = _header(records)
        self._unpack(records[:, _HEADER:], values)
        values.mul_(header[:, 0:1]).add_(header[:, 1:2])

    @abstractmethod
    def _pack(self, codes: Tensor, packed: Tensor) -> None:
        """Write the codes (b, BLOCK), whole numbers in fp32, in as few bytes as they need."""

    @abstractmethod
    def _unpack(self, packed: Tensor, values: Tensor) -> None:
        """The reverse, into fp32."""


class _Int8(_Affine):
    name = "int8"
    record = _HEADER + BLOCK
    levels = 256

    def _pack(self, codes: Tensor, packed: Tensor) -> None:
        packed.copy_(codes)

    def _unpack(self, packed: Tensor, values: Tensor) -> None:
        values.copy_(packed)


class _Int4(_Affine):
    """Byte i of the codes holds element i in its low half and element i + BLOCK/2 in its high half."""

    name = "int4"
    record = _HEADER + BLOCK // 2
    levels = 16

    def _pack(self, codes: Tensor, packed: Tensor) -> None:
        low, high = codes[:, : BLOCK // 2], codes[:, BLOCK // 2 :]
        packed.copy_(high.mul_(16).add_(low))

    def _unpack(self, packed: Tensor, values: Tensor) -> None:
        values[:, : BLOCK // 2] = packed & 15
        values[:, BLOCK // 2 :] = packed >> 4


class _BF16(Codec):
    name = "bf16"
    record = 2 * BLOCK

    def _encode(self, values: Tensor, records: Tensor, noise: Tensor | None) -> None:
        if noise is not None:
            # Carries of the bits that are cut off round up with their probability; into an infinity at the very top.
            bits = values.view(torch.int32)
            jolted = (bits + (noise.to(torch.int32) & 0xFFFF)) & -0x10000
            values = torch.where(values.isfinite(), jolted.view(torch.float32), values)
        records.view(torch.bfloat16).copy_(values)

    def _decode(self, records: Tensor, values: Tensor) -> None:
        values.copy_(records.view(torch.bfloat16))


CODECS: dict[str, Codec] = {codec.name: codec for codec in (_Int8(), _Int4(), _BF16())}


def find(codec: str, rounding: str) -> Codec:
    """Return the codec of that name.

    Raises:
        UsageError: there is no such codec or rounding.

    """
    if codec not in CODECS:
        raise UsageError(f"codec must be one of {', '.join(CODECS)}, not {codec!r}")
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    return CODECS[codec]


def blocks(count: int) -> int:
    """Number of blocks, and so of records, of `count` elements."""
    return -(-count // BLOCK)


def _tiles(count: int, records: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop) of the elements and the records, (b, size), of each tile."""
    rows = records.view(-1, size)
    for first in range(0, blocks(count), _TILE):
        yield first * BLOCK, min((first + _TILE) * BLOCK, count), rows[first : first + _TILE]


def _header(records: Tensor) -> Tensor:
    """Step and zero point of each record (b, record), as a view (b, 2) of fp32."""
    return records.view(torch.float32)[:, :2]
