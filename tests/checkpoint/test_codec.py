"""Byte planes and zstd: whatever goes in comes out, and what has entropy to spare shrinks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.codec import Codec, decode
from checkpoint.dtypes import ITEMSIZE
from collectives.errors import CorruptChunk, OptionError


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.binary(max_size=3000), st.sampled_from(sorted(ITEMSIZE)), st.sampled_from([0, 1, 9]), st.integers(1, 40))
def test_any_bytes_come_back(data: bytes, dtype: str, level: int, times: int) -> None:
    raw = np.frombuffer(data * times, np.uint8)
    stored = Codec(level).encode(raw, dtype)
    assert len(stored) <= len(raw)
    assert decode(stored, len(raw)).tobytes() == raw.tobytes()


def weights(dtype: torch.dtype, count: int = 1 << 19) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Values as trained weights have them: normal, of a scale that differs by row."""
    chance = torch.Generator().manual_seed(0)
    scales = torch.rand(count // 512, 1, generator=chance) * 0.05 + 0.005
    values = (torch.randn(count // 512, 512, generator=chance) * scales).to(dtype)
    found: np.ndarray[tuple[int], np.dtype[np.uint8]] = values.reshape(-1).view(torch.uint8).numpy()
    return found


@pytest.mark.parametrize(
    ("dtype", "name", "most"),
    # Entropy of the exponents, which is all that weights have to spare: under 3 bits of 8, of words of 16 and 32 bits.
    [(torch.bfloat16, "BF16", 0.69), (torch.float32, "F32", 0.86), (torch.float16, "F16", 0.90)],
)
def test_exponents_shrink_and_mantissas_are_stored_as_they_are(dtype: torch.dtype, name: str, most: float) -> None:
    raw = weights(dtype)
    stored = Codec(1).encode(raw, name)
    assert 0.5 < len(stored) / len(raw) <= most
    assert (decode(stored, len(raw)) == raw).all()
    planes = np.frombuffer(stored[10 : 10 + 4 * stored[1]].tobytes(), "<u4")
    assert planes[0] < planes[-1] == len(raw) // int(stored[1]), "the first plane shrank, the last is raw"


def test_masters_of_bf16_weights_store_no_zeros() -> None:
    raw = weights(torch.bfloat16).view(np.uint16).astype(np.uint32) << 16
    stored = Codec(1).encode(raw.view(np.uint8), "F32")
    assert len(stored) < 0.36 * raw.nbytes


def test_raw_stays_raw() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)
    assert Codec(1).encode(noise, "U8") is noise
    assert Codec(0).encode(np.zeros(1 << 16, np.uint8), "F32").nbytes == 1 << 16
    assert len(Codec(1).encode(np.zeros(1 << 16, np.uint8), "F32")) < 200


def test_errors() -> None:
    for level in (-1, 23):
        with pytest.raises(OptionError, match="0 \\(none\\) to 22"):
            Codec(level)
    stored = Codec(1).encode(np.zeros(4096, np.uint8), "F32")
    with pytest.raises(CorruptChunk, match="other bytes"):
        decode(stored[:-1], 4096)
    with pytest.raises(CorruptChunk, match="header"):
        decode(np.concatenate([[np.uint8(9)], stored[1:]]), 4096)
    with pytest.raises(CorruptChunk, match="a plane of 512 bytes announces 1024"):
        decode(stored, 2048)
