"""How the bytes of one chunk are stored: byte planes, those that shrink by zstd, the others as they are.

Writers call `encode`, readers `decode`. A chunk is decoded without any other. The idea of planes is that of DFloat11
(arXiv 2504.11651) and ZipNN (arXiv 2411.05239): exponents of trained weights carry some 3 bits of information in 8,
mantissas all of theirs. Words of floating-point dtypes are first rotated left by one bit, which puts the sign last and
brings the exponent of BF16 and F32 into one byte.

An encoded chunk is shorter than the raw one; what would not be is stored raw, so a length says which of the two it is.
It begins with a header:

    byte 0      1: planes of words as they are, 2: of words rotated left by one bit
    byte 1      w, bytes of a word: 1, 2, 4 or 8; so many planes follow, that of the most significant byte first
    bytes 2-9   the first 8 bytes of BLAKE3 of all that follows: no flipped bit passes, whatever zstd makes of it
    4w bytes    stored length of each plane, u32 little-endian

Plane i of n words has n bytes: stored raw if its stored length is n, else as one zstd frame.
"""

import struct
from dataclasses import dataclass
from threading import local
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from checkpoint.dtypes import FLOATS, ITEMSIZE
from collectives.errors import CorruptChunk, OptionError
from collectives.hashing import digest

Bytes = npt.NDArray[np.uint8]

LEVELS = range(23)
PLAIN, ROTATED = 1, 2
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SAMPLE = 2048
"""Bytes of each of the places of a plane that are tried before the whole is compressed."""
_PLACES = 8
_WORTH = 0.97
"""A plane that does not shrink to this part of its size is stored raw."""
_FIXED = 10
"""Bytes of the header before the lengths."""
_CHECK = 8
_LEAST = 64
"""Chunks of fewer bytes are stored raw: the header would eat the gain."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How hard to compress.

    Args:
        level: of zstd, 1 to 22; 0 stores everything raw.

    Raises:
        OptionError: there is no such level.

    """

    level: int = 1

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise OptionError(f"the compression level is 0 (none) to {LEVELS[-1]}, not {self.level}")

    def encode(self, raw: Bytes, dtype: str) -> Bytes:
        """The bytes to store for a chunk; `raw` itself where nothing shorter was found.

        Args:
            raw: flat, contiguous.
            dtype: a hint of what the bytes are; any other gives bytes that decode to the same, only longer ones.

        """
        width = min(ITEMSIZE[dtype], 8)
        if dtype == "C64":
            width = 4
        if self.level == 0 or len(raw) < _LEAST or len(raw) % width:
            return raw
        rotated = dtype in FLOATS
        planes = _split(raw, width, rotated)
        stored = [self._plane(plane, rotated and place == 0) for place, plane in enumerate(planes)]
        head = _FIXED + 4 * width
        size = head + sum(map(len, stored))
        if size >= len(raw):
            return raw
        out = np.empty(size, dtype=np.uint8)
        out[_FIXED:head] = np.frombuffer(struct.pack(f"<{width}I", *map(len, stored)), dtype=np.uint8)
        at = head
        for part in stored:
            out[at : at + len(part)] = np.frombuffer(part, dtype=np.uint8)
            at += len(part)
        fixed = bytes((ROTATED if rotated else PLAIN, width)) + digest(out[_FIXED:])[:_CHECK]
        out[:_FIXED] = np.frombuffer(fixed, dtype=np.uint8)
        return out

    def _plane(self, plane: Bytes, exponents: bool) -> Bytes | bytes:
        """The plane, compressed if that pays."""
        compressor = _compressor(self.level, exponents)
        if not exponents and len(plane) > 2 * _SAMPLE * _PLACES:
            step = len(plane) // _PLACES
            sample = plane[: step * _PLACES].reshape(_PLACES, step)[:, :_SAMPLE].tobytes()
            if len(compressor.compress(sample)) > _WORTH * len(sample):
                return plane
        packed: bytes = compressor.compress(plane)
        return packed if len(packed) < _WORTH * len(plane) else plane


def decode(stored: Bytes, size: int) -> Bytes:
    """The `size` raw bytes of a chunk from what was stored for it. Never allocates more than a few times `size`.

    Raises:
        CorruptChunk: `encode` cannot have made this of `size` bytes.

    """
    if len(stored) == size:
        return stored
    if not _FIXED <= len(stored) < size:
        raise CorruptChunk(f"{len(stored)} bytes are stored for a chunk of {size}")
    kind, width = int(stored[0]), int(stored[1])
    head = _FIXED + 4 * width
    if kind not in (PLAIN, ROTATED) or width not in _WORDS or size % width or len(stored) < head:
        raise CorruptChunk("the header of an encoded chunk is malformed")
    if digest(stored[_FIXED:])[:_CHECK] != stored[2:_FIXED].tobytes():
        raise CorruptChunk("other bytes than were stored")
    lengths = struct.unpack(f"<{width}I", stored[_FIXED:head].tobytes())
    if head + sum(lengths) != len(stored):
        raise CorruptChunk("the planes of an encoded chunk do not fill it")
    words = np.empty(size // width, dtype=_WORDS[width])
    by_byte = words.view(np.uint8).reshape(-1, width)
    at = head
    for place, length in enumerate(lengths):
        by_byte[:, width - 1 - place] = _whole_plane(stored[at : at + length], len(words))
        at += length
    if kind == ROTATED:
        top = words << (8 * width - 1)
        words >>= 1
        words |= top
    return words.view(np.uint8)


def _split(raw: Bytes, width: int, rotated: bool) -> list[Bytes]:
    """The planes of the words, that of the most significant byte first."""
    if width == 1:
        return [raw]
    words = raw.view(_WORDS[width])
    shifts = [8 * place - rotated for place in reversed(range(width))]  # narrowing after a shift beats strided copies
    planes = [(words >> shift).astype(np.uint8) for shift in shifts[:-1]]
    last = (words << 1) | (words >> (8 * width - 1)) if rotated else words
    return [*planes, last.astype(np.uint8)]


def _whole_plane(stored: Bytes, size: int) -> Bytes:
    if len(stored) == size:
        return stored
    if len(stored) > size:
        raise CorruptChunk("a plane of an encoded chunk is longer than the plane")
    try:
        announced = zstandard.frame_content_size(stored.data)
        if announced != size:
            raise CorruptChunk(f"a plane of {size} bytes announces {announced}")
        return np.frombuffer(_decompressor().decompress(stored.data, allow_extra_data=False), dtype=np.uint8)
    except zstandard.ZstdError as error:
        raise CorruptChunk(f"a plane of an encoded chunk cannot be decompressed: {error}") from None


_kept = local()
"""Contexts of zstd, which are for one thread at a time and costly to make."""


def _compressor(level: int, exponents: bool) -> Any:
    name = f"compressor {level} {exponents}"
    if not hasattr(_kept, name):
        # Exponents are as good as independent of each other: entropy coding is all the gain there is, and a tiny table
        # of matches makes it twice as fast, and shorter for the false matches it leaves out.
        special = {"min_match": 7, "hash_log": 6, "window_log": 17} if exponents and level < 3 else {}
        parameters = zstandard.ZstdCompressionParameters.from_level(level, **special)
        setattr(_kept, name, zstandard.ZstdCompressor(compression_params=parameters))
    return getattr(_kept, name)


def _decompressor() -> Any:
    if not hasattr(_kept, "decompressor"):
        _kept.decompressor = zstandard.ZstdDecompressor()
    return _kept.decompressor
