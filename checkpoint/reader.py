"""Reading a step of a store without torch: boxes of tensors, verified chunk by chunk, with bounded memory.

For conversion, comparison and inspection; `checkpoint.loading` fills tensors of torch by the same plan of reads.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from checkpoint import nest
from checkpoint.codec import Bytes
from checkpoint.dtypes import ITEMSIZE
from checkpoint.manifest import Chunk, Manifest, TensorEntry
from checkpoint.packs import read_chunk, verified
from checkpoint.store import Store, pack_name, parse_reference
from collectives.errors import NoCheckpoint
from collectives.region import Region

GAP = 64 << 10
"""Bytes between two wanted chunks that are read along, rather than to read twice."""
BURST = 8 << 20
"""Most bytes of a pack that are read at once, unless one chunk has more."""


class Reader:
    """One step of a store. For any thread; a context manager.

    Args:
        url: path or URL of the store, `@STEP` behind it for a step.
        step: which; None: the newest, unless the URL names one.

    Raises:
        NoCheckpoint: it is not there.
        UnknownFormat, CorruptFile: its manifest cannot be read.

    """

    def __init__(self, url: str | os.PathLike[str], step: int | None = None) -> None:
        path, named = parse_reference(os.fspath(url))
        self.store = Store(path)
        self.manifest: Manifest = self.store.manifest(named if step is None else step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is kept open."""
        self.store.close()

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """What tensors there are: dtype, shape, chunks, by key."""
        return self.manifest.tensors

    def state(self, tensor: Any = None) -> Any:
        """The nested state, with `tensor(key)` in the place of each tensor; by default its key."""
        return nest.put_together(self.manifest.state, tensor or str)

    def read(self, key: str, box: Region | None = None) -> Bytes:
        """The raw bytes of a box of a tensor (None: of all of it): little-endian, row-major, flat uint8.

        Holds one chunk at a time besides the result.

        Raises:
            NoCheckpoint: there is no such tensor.
            CorruptChunk, CorruptFile, StorageFailed: see `read_chunk`.

        """
        if key not in self.tensors:
            raise NoCheckpoint(f"step {self.manifest.step} of {self.store.url} has no tensor {key!r}")
        entry = self.tensors[key]
        wanted = Region.whole(entry.shape) if box is None else box
        size = ITEMSIZE[entry.dtype]
        out = np.empty((*wanted.shape, size), dtype=np.uint8)
        grid = entry.boxes
        for index in grid.touching(wanted):
            part = grid.box(index)
            raw = self.chunk(self.manifest.chunks[entry.chunks[index]]).reshape(*part.shape, size)
            both = part.intersect(wanted)
            out[inside(both, wanted)] = raw[inside(both, part)]
        return out.reshape(-1)

    def chunk(self, chunk: Chunk) -> Bytes:
        """The raw bytes of a chunk, verified."""
        return read_chunk(self.store.storage, self.manifest.packs[chunk.pack], chunk)

    def fetch(self, burst: "Burst") -> Iterator[tuple[Chunk, Bytes]]:
        """The raw bytes of the chunks of one burst, verified; each is decoded when its turn comes."""
        pack = self.manifest.packs[burst.pack]
        stored = np.empty(burst.length, dtype=np.uint8)
        self.store.storage.read_into(pack_name(pack), burst.offset, stored)
        for chunk in burst.chunks:
            at = chunk.offset - burst.offset
            yield chunk, verified(stored[at : at + chunk.length], pack, chunk, self.store.url)


class Burst(NamedTuple):
    """Chunks that lie near each other in a pack and are read at once."""

    pack: int
    offset: int
    length: int
    chunks: tuple[Chunk, ...]


def bursts(chunks: Sequence[Chunk], most: int = BURST) -> list[Burst]:
    """How to read some chunks, each once, with few reads of at most `most` bytes (more for one larger chunk)."""
    found: list[Burst] = []
    for chunk in sorted(set(chunks), key=lambda chunk: (chunk.pack, chunk.offset, chunk.length, chunk.digest)):
        if found:
            last = found[-1]
            end = chunk.offset + chunk.length
            if (
                last.pack == chunk.pack
                and chunk.offset <= last.offset + last.length + GAP
                and end - last.offset <= most
            ):
                length = max(last.length, end - last.offset)
                found[-1] = Burst(last.pack, last.offset, length, (*last.chunks, chunk))
                continue
        found.append(Burst(chunk.pack, chunk.offset, chunk.length, (chunk,)))
    return found


def inside(box: Region, outer: Region) -> tuple[slice, ...]:
    """The index by which `box` is found in an array that holds `outer`, with any dimensions behind."""
    return tuple(
        slice(first - base, last - base) for first, last, base in zip(box.start, box.stop, outer.start, strict=True)
    )
