"""Writing a step of a store from one process without torch: for conversion, and for anybody who has the bytes.

`checkpoint.saving` is for a job with its tensors spread over ranks; the result is the same to the byte.
"""

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Self

import msgspec
import numpy as np

from checkpoint import leases
from checkpoint.codec import Bytes, Codec
from checkpoint.dtypes import itemsize
from checkpoint.grid import Grid
from checkpoint.manifest import Chunk, Manifest, TensorEntry
from checkpoint.nest import Json
from checkpoint.packs import PackWriter, Piece, Placed, Written
from checkpoint.store import Store, new_save_name
from collectives.errors import RingholdError, UsageError
from collectives.region import Region
from parallel.layout import Layout

BATCH = 16 << 20
"""Raw bytes that are read, then hashed and encoded together."""


class Writer:
    """Writes one step; a context manager that publishes nothing unless `finish` was called.

        with Writer("runs/mine", step=120) as writer:
            writer.add("model/weight", "F32", (4096, 4096), read)
            writer.finish({"model": {"weight": {"$tensor": "model/weight"}}, "lr": 0.1})

    Args:
        url: path or URL of the store; made if it is not there.
        step: number of the step.
        codec: how to encode.
        threads: how many hash and encode.

    Raises:
        StorageFailed: the store cannot be written.

    """

    def __init__(self, url: str | os.PathLike[str], step: int, codec: Codec | None = None, threads: int = 1) -> None:
        self.store = Store(url)
        self._step = step
        self._save = begin(self.store, step, "0")
        self._pack = PackWriter(
            self.store.storage, f"{self._save.name}-0.pack", codec or Codec(), self._save.known, threads
        )
        self._table = Table()
        self._tensors: dict[str, TensorEntry] = {}
        self._layouts: dict[Layout, int] = {}
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self._pack.abandon()
        self._save.lease.release()
        self.store.close()

    @property
    def written(self) -> Written:
        """What was written so far."""
        return self._pack.written

    def add(
        self,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        read: Callable[[Region], Bytes],
        layout: Layout | None = None,
    ) -> None:
        """Write a tensor.

        Args:
            key: see `checkpoint.nest`.
            dtype: by its name in `checkpoint.dtypes`.
            shape: of the whole tensor.
            read: gives the raw bytes of a box (little-endian, row-major, flat uint8); called for boxes in row-major
                order of `Grid.of(shape, itemsize)`, each once.
            layout: noted in the manifest, for people.

        Raises:
            UsageError: the key was there before, or `read` gave another number of bytes than the box has.
            StorageFailed: the pack cannot be written.

        """
        if key in self._tensors:
            raise UsageError(f"two tensors have the key {key!r}")
        size = itemsize(dtype)
        grid = Grid.of(tuple(shape), size)
        chunks: list[int] = []
        batch: list[Piece] = []
        waiting = 0
        for box in grid.boxes():
            raw = np.ascontiguousarray(read(box))
            if raw.dtype != np.uint8 or raw.shape != (box.size * size,):
                raise UsageError(f"{box.size * size} bytes were wanted of {key!r}, {raw.nbytes} given")
            batch.append(Piece(raw, dtype))
            waiting += len(raw)
            if waiting >= BATCH:
                chunks += map(self._table.number, self._pack.add(batch))
                batch, waiting = [], 0
        chunks += map(self._table.number, self._pack.add(batch))
        noted = None if layout is None else self._layouts.setdefault(layout, len(self._layouts))
        self._tensors[key] = TensorEntry(dtype, grid.shape, grid.cuts, tuple(chunks), noted)

    def finish(self, state: Json, metadata: Mapping[str, Any] | None = None) -> Manifest:
        """Publish the step.

        Args:
            state: as `checkpoint.nest.take_apart` gives it; names every tensor that was added, each once.
            metadata: JSON values to keep with it.

        Raises:
            UsageError: the state names other tensors than were added, or something is no JSON.
            StorageFailed: it cannot be written.

        """
        self._pack.close()
        manifest = self._table.manifest(self._step, state, self._tensors, list(self._layouts), metadata or {})
        self.store.publish(manifest)
        self._finished = True
        return manifest


class Table:
    """The chunks of a manifest while it is made: each place in a pack once."""

    def __init__(self) -> None:
        self._index: dict[tuple[str, int], int] = {}
        self._placed: list[Placed] = []

    def number(self, placed: Placed) -> int:
        """The index of a chunk; it is taken in if it is new."""
        place = (placed.pack, placed.chunk.offset)
        if place not in self._index:
            self._index[place] = len(self._placed)
            self._placed.append(placed)
        return self._index[place]

    def manifest(
        self,
        step: int,
        state: Json,
        tensors: dict[str, TensorEntry],
        layouts: list[Layout],
        metadata: Mapping[str, Any],
    ) -> Manifest:
        """The manifest, checked as a reader would. Raises `UsageError` if no reader would take it."""
        packs = {name: index for index, name in enumerate(dict.fromkeys(placed.pack for placed in self._placed))}
        manifest = Manifest(
            step=step,
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
            state=state,
            tensors=tensors,
            chunks=tuple(_in_pack(placed.chunk, packs[placed.pack]) for placed in self._placed),
            packs=tuple(packs),
            layouts=tuple(layout.to_json() for layout in layouts),
            metadata=dict(metadata),
        )
        try:
            Manifest.decode(manifest.encode(), "this manifest")
        except UsageError:
            raise
        except RingholdError as error:
            raise UsageError(f"this cannot be saved: {error}") from None
        return manifest


class Save:
    """A save under way on this process: its lease, its name, and the chunks that need not be written again."""

    def __init__(self, lease: leases.Held, name: str, known: dict[str, Placed]) -> None:
        self.lease, self.name, self.known = lease, name, known


def begin(store: Store, step: int, writer: str, name: str = "", base: int | None = None) -> Save:
    """Say that a save begins, and find what it shares with an earlier step.

    Args:
        store: where.
        step: number of the step to save.
        writer: tells the writers of one save apart.
        name: of the save, where others take part in it; empty: a new one.
        base: step whose chunks are shared where no gc is at work; None: the newest.

    """
    name = name or new_save_name(step)
    steps = store.steps()
    if base is None and steps:
        base = steps[-1]
    lease = leases.take(store.storage, leases.Lease.mine("save", name, () if base is None else (base,)), writer)
    try:
        return Save(lease, name, {} if base is None else shared_chunks(store, base))
    except BaseException:
        lease.release()
        raise


def shared_chunks(store: Store, base: int) -> dict[str, Placed]:
    """Chunks of a step by digest; none if a gc is at work, or if the step cannot be read: they are written again."""
    if any(lease.kind == "gc" and lease.alive for lease in leases.read_all(store.storage).values()):
        return {}
    try:
        manifest = store.manifest(base)
    except RingholdError:
        return {}
    return {digest: Placed(pack, chunk) for digest, (pack, chunk) in manifest.known().items()}


def _in_pack(chunk: Chunk, pack: int) -> Chunk:
    return msgspec.structs.replace(chunk, pack=pack)
