"""Digests are those that the module's text defines, whatever the number of threads."""

import numpy as np
import pytest
from blake3 import blake3

from collectives import hashing
from collectives.hashing import CHUNK_BYTES, chunk_count, cut, digest, digests, leaf_digest, state_digest


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunks_cover_a_tensor_on_the_grid(size: int) -> None:
    chunks = cut(size)
    assert [byte for start, stop in chunks for byte in (start, stop)][1:-1:2] == [start for start, _ in chunks[1:]]
    assert sum(stop - start for start, stop in chunks) == size
    assert all(start % CHUNK_BYTES == 0 for start, _ in chunks)
    assert len(chunks) == chunk_count(size)


def test_a_chunk_is_known_by_plain_blake3_of_its_bytes() -> None:
    data = np.arange(256, dtype=np.uint8)
    assert (
        digest(data) == digest(data.tobytes()) == digest(memoryview(data.tobytes())) == blake3(data.tobytes()).digest()
    )
    assert digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_leaf_and_state_digests_are_as_the_text_says() -> None:
    chunks = [digest(b"a"), digest(b"b")]
    leaf = blake3(b"".join(chunks), derive_key_context="ringhold 2025 tensor of chunks v1").digest()
    assert leaf_digest(chunks) == leaf
    state = blake3(blake3(b"skeleton").digest() + leaf, derive_key_context="ringhold 2025 state of leaves v1").digest()
    assert state_digest(b"skeleton", [leaf]) == state
    assert len({leaf_digest([]), digest(b""), state_digest(b"", [])}) == 3


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    pieces = [data[start : start + 37] for start in range(0, len(data), 37)]
    expected = digests(pieces)
    monkeypatch.setattr(hashing, "_THREAD_BYTES", 100)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert digests(pieces) == expected == [digest(piece) for piece in pieces]
    assert digests([]) == []
