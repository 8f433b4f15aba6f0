"""The real checkpoints of tests/fixtures, unpacked once for a session, and the truth beside each."""

import atexit
import json
import shutil
import struct
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from checkpoint.lazy import slices
from checkpoint.source import Entry, Source, blocks
from collectives.region import Region

ARCHIVES = Path(__file__).resolve().parent.parent / "fixtures"
VOCABULARY = 131


class Tensor(NamedTuple):
    """A tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@cache
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="ringhold-checkpoints-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def unpacked(family: str) -> Path:
    """The folder of a family: "ds", "fsdp", "mcore", "hf" or "more". Tests do not change what is in it."""
    with tarfile.open(ARCHIVES / f"{family}.tar.xz") as archive:
        archive.extractall(_folder(), filter="data")
    return _folder() / family


def safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, read by its specification alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    found = {}
    for name, row in table.items():
        start, stop = (8 + length + offset for offset in row["data_offsets"])
        found[name] = Tensor(row["dtype"], tuple(row["shape"]), data[start:stop])
    return found


def differences(source: Source, truth: dict[str, Tensor], rows: int | None = None, block: int = 1000) -> list[str]:
    """What of the truth a source lacks or has otherwise, bit by bit; it is read in small blocks.

    `rows`: of embeddings only so many rows count.
    """
    found = []
    for key, wanted in truth.items():
        entry = source.entries.get(key)
        if entry is None:
            found.append(f"{key} is missing")
            continue
        expected, shape = wanted.data, wanted.shape
        if rows is not None and ("word_embeddings" in key or "output_layer" in key):
            expected, shape = expected[: rows * len(expected) // shape[0]], (rows, *shape[1:])
        read = b"".join(bytes(source.read(key, box)) for box in blocks(Entry("", "", entry.dtype, shape), block))
        if (entry.dtype, read) != (wanted.dtype, expected) or (rows is None and entry.shape != shape):
            found.append(f"{key} differs: {entry.dtype} {entry.shape}, wanted {wanted.dtype} {wanted.shape}")
    return found


def cut(tensor: Tensor, box: Region) -> bytes:
    """The bytes of a box of a tensor, by numpy."""
    import numpy as np

    from checkpoint.lazy import carrier

    whole = np.frombuffer(tensor.data, carrier(tensor.dtype)).reshape(tensor.shape)
    return whole[slices(box)].tobytes()
