"""Packs: files of chunks, one behind the other. Writing them with what is known left out, and reading chunks verified.

`PackWriter` is for one writer of one save; `read_chunks` is what every reader of a store goes through.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

import numpy as np

from checkpoint.codec import Bytes, Codec, decode
from checkpoint.manifest import Chunk
from checkpoint.storage import Sink, Storage
from checkpoint.store import pack_name
from collectives.errors import CorruptChunk
from collectives.hashing import digest

A = TypeVar("A")
R = TypeVar("R")

MAGIC = b"RINGPACK"
"""What a pack starts with; offsets count from the start of the file."""


class Placed(NamedTuple):
    """A chunk and the pack that holds it."""

    pack: str
    chunk: Chunk
    """Its `pack` index means nothing yet."""


class Piece(NamedTuple):
    """A chunk to be written: its raw bytes, flat, and its dtype."""

    raw: Bytes
    dtype: str


@dataclass(slots=True)
class Written:
    """What a writer did."""

    chunks: int = 0
    """Written to the pack."""
    raw: int = 0
    """Bytes of these."""
    stored: int = 0
    """Bytes that these take."""
    shared: int = 0
    """Raw bytes of chunks that were in the store already."""

    def plus(self, other: "Written") -> "Written":
        """The sum of two."""
        return Written(
            self.chunks + other.chunks,
            self.raw + other.raw,
            self.stored + other.stored,
            self.shared + other.shared,
        )


class PackWriter:
    """Writes one pack. For one thread. The file is created with the first chunk that is not known.

    Args:
        storage: of the store.
        pack: name of the file in the folder of packs.
        codec: how to encode.
        known: chunks that are in the store already, by digest; grows by what is written.
        threads: how many encode and hash.

    """

    def __init__(self, storage: Storage, pack: str, codec: Codec, known: dict[str, Placed], threads: int = 1) -> None:
        self._storage, self._pack, self._codec, self._known = storage, pack, codec, known
        self._pool = ThreadPoolExecutor(threads, "ringhold-encode") if threads > 1 else None
        self._sink: Sink | None = None
        self._at = 0
        self.written = Written()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()
        else:
            self.close()

    def add(self, pieces: Sequence[Piece]) -> list[Placed]:
        """Write what is not known yet of some chunks; where each of them is now, in order.

        Raises:
            StorageFailed: the disk is full, or whatever else it is.

        """
        names = self._map(lambda piece: digest(piece.raw).hex(), pieces)
        fresh: dict[str, Piece] = {}
        for name, piece in zip(names, pieces, strict=True):
            if name in self._known or name in fresh:
                self.written.shared += len(piece.raw)
            else:
                fresh[name] = piece
        stored = self._map(lambda piece: self._codec.encode(piece.raw, piece.dtype), list(fresh.values()))
        for (name, piece), data in zip(fresh.items(), stored, strict=True):
            self._known[name] = Placed(self._pack, Chunk(name, len(piece.raw), 0, self._append(data), len(data)))
            self.written.chunks += 1
            self.written.raw += len(piece.raw)
            self.written.stored += len(data)
        return [self._known[name] for name in names]

    def close(self) -> None:
        """Bring the pack to the disk. Raises `StorageFailed`."""
        self._stop()
        if self._sink is not None:
            sink, self._sink = self._sink, None
            sink.close()

    def abandon(self) -> None:
        """Give it up."""
        self._stop()
        if self._sink is not None:
            self._sink.abandon()
            self._sink = None

    def _append(self, data: Bytes) -> int:
        """Where the data begin."""
        if self._sink is None:
            self._sink = self._storage.create(pack_name(self._pack))
            self._sink.write(MAGIC)
            self._at = len(MAGIC)
        self._sink.write(data)
        at, self._at = self._at, self._at + len(data)
        return at

    def _map(self, work: Callable[[A], R], items: Sequence[A]) -> list[R]:
        return list(map(work, items)) if self._pool is None else list(self._pool.map(work, items))

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def read_chunk(storage: Storage, pack: str, chunk: Chunk) -> Bytes:
    """The raw bytes of a chunk, verified.

    Raises:
        CorruptChunk: they are not what was written.
        CorruptFile: the pack ends before that.
        StorageFailed: it cannot be read.

    """
    stored = np.empty(chunk.length, dtype=np.uint8)
    storage.read_into(pack_name(pack), chunk.offset, stored)
    return verified(stored, pack, chunk, storage.url)


def verified(stored: Bytes, pack: str, chunk: Chunk, url: str) -> Bytes:
    """The raw bytes of a chunk from what is stored. Raises `CorruptChunk`."""
    where = f"chunk {chunk.digest[:12]} at byte {chunk.offset} of {url}/{pack_name(pack)}"
    try:
        raw = decode(stored, chunk.size)
    except CorruptChunk as error:
        raise CorruptChunk(f"{where} is corrupt ({error}); load another step or copy of the checkpoint") from None
    if digest(raw).hex() != chunk.digest:
        raise CorruptChunk(
            f"{where} is corrupt: other bytes than were saved; load another step or copy of the checkpoint"
        )
    return raw
