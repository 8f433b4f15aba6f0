"""BLAKE3, computed here and nowhere else: the names by which chunks, tensors and states are known.

`collectives.state` and `collectives.sync` prove with them that peers hold the same bits and find what differs; the
chunk store of `checkpoint` uses a chunk's digest as its address. The module needs no torch.

What is hashed, so that any reader can recompute it:

- A *chunk* is at most `CHUNK_BYTES` of a tensor's raw bytes (row-major, little-endian as in memory), cut at
  multiples of `CHUNK_BYTES` from the tensor's start. Its digest is plain BLAKE3 of these bytes.
- A *leaf* is a whole tensor. Its digest is BLAKE3, in key derivation mode with context `LEAF_CONTEXT`, of the digests
  of its chunks in order. An empty tensor has no chunk.
- A *state* is a nest of dicts and lists with tensors in it. Its digest is BLAKE3, with context `STATE_CONTEXT`, of the
  plain BLAKE3 of its skeleton (structure, dtypes, shapes and all that is no tensor) and the digests of its leaves.

The contexts keep the three kinds apart: no chunk can be made that passes for a leaf.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

CHUNK_BYTES = 1 << 20
"""Largest chunk, and the unit of the grid on which a tensor is cut."""
DIGEST_BYTES = 32
LEAF_CONTEXT = "ringhold 2025 tensor of chunks v1"
STATE_CONTEXT = "ringhold 2025 state of leaves v1"

Data: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

_THREAD_BYTES = 16 << 20
"""A second thread pays from about this many bytes on; BLAKE3 of it takes 3 to 6 ms."""
_MOST_THREADS = 8


def cut(size: int) -> list[tuple[int, int]]:
    """The chunks `[start, stop)`, in bytes, of a tensor of `size` raw bytes; none if it is empty."""
    return [(start, min(start + CHUNK_BYTES, size)) for start in range(0, size, CHUNK_BYTES)]


def chunk_count(size: int) -> int:
    """How many chunks `cut` gives, for sizes that nobody has vouched for."""
    return -(-size // CHUNK_BYTES)


def digest(data: Data) -> bytes:
    """BLAKE3 of raw bytes: of a chunk, or of anything else that is addressed by content."""
    return blake3(data.data if isinstance(data, np.ndarray) else data).digest()


def digests(pieces: Sequence[Data]) -> list[bytes]:
    """`digest` of every piece, in order, by several threads where there is enough to do (BLAKE3 releases the GIL)."""
    total = sum(len(piece) for piece in pieces)
    threads = min(os.cpu_count() or 1, _MOST_THREADS, total // _THREAD_BYTES)
    if threads < 2:
        return [digest(piece) for piece in pieces]
    found = [b""] * len(pieces)

    def share(first: int) -> None:
        found[first::threads] = [digest(piece) for piece in pieces[first::threads]]

    with ThreadPoolExecutor(threads) as pool:  # of this call alone: a pool that is kept does not survive a fork
        list(pool.map(share, range(threads)))
    return found


def leaf_digest(chunks: Iterable[bytes]) -> bytes:
    """Digest of a tensor from the digests of its chunks, in order."""
    return blake3(b"".join(chunks), derive_key_context=LEAF_CONTEXT).digest()


def state_digest(skeleton: bytes, leaves: Iterable[bytes]) -> bytes:
    """Digest of a state from its packed skeleton and the digests of its tensors in canonical order."""
    return blake3(digest(skeleton) + b"".join(leaves), derive_key_context=STATE_CONTEXT).digest()
