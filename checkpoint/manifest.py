"""The manifest of one saved step: which tensors there are, of which chunks, and where in which pack each chunk lies.

`checkpoint.store` reads and publishes it; the format is specified in docs/format.md. A manifest is JSON for people to
read, under a head of one line with the digest of the rest, so that not one flipped bit passes. Whatever is read is
checked before anything is believed: a manifest may come from anywhere.
"""

import math
import re
from typing import Any, Self

import msgspec

from checkpoint.dtypes import ITEMSIZE
from checkpoint.grid import Grid
from checkpoint.nest import Json, tensor_keys
from collectives.errors import CorruptFile, RingholdError, UnknownFormat, UsageError
from collectives.hashing import DIGEST_BYTES, digest
from parallel.layout import Layout

FORMAT = "ringhold checkpoint"
SCHEMA = 1
MAX_MANIFEST = 1 << 30
"""Most bytes of a manifest; at 1 MiB a chunk it describes some 5 TiB."""
MAX_CHUNK = 64 << 20
"""Most raw bytes of a chunk; a reader holds a few at a time."""
_MAX_DIMS = 64
_HEX = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}", re.ASCII)
_PACK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.pack", re.ASCII)
"""Names of packs: no folder, no dot but the last, so that none leads out of the store."""
_HEAD = re.compile(rb'\{"format": "([^"\\]*)", "schema": ([0-9]{1,9}), "blake3": "([^"\\]*)", "body":\n')
_TAIL = b"}\n"


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A chunk: BLAKE3 of its raw bytes as hex, how many they are, and where they are stored.

    It is stored encoded (`checkpoint.codec`) if `length`, the number of stored bytes, is less than `size`.
    """

    digest: str
    size: int
    pack: int
    """Index in `Manifest.packs`."""
    offset: int
    length: int


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor. `chunks[i]` is the index in `Manifest.chunks` of the i-th box of the grid, in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    grid: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    layout: int | None = None
    """Index in `Manifest.layouts` of the layout by which it was saved: for people; readers do not need it."""

    @property
    def boxes(self) -> Grid:
        """Its grid."""
        return Grid(self.shape, self.grid)

    @property
    def nbytes(self) -> int:
        """Raw bytes of the whole tensor."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Manifest(msgspec.Struct, frozen=True):
    """One step of a store. Fields that are not known here are ignored when it is read."""

    step: int
    saved: str
    """When: UTC, ISO 8601."""
    state: Json
    """The nest without tensors; see `checkpoint.nest`."""
    tensors: dict[str, TensorEntry]
    chunks: tuple[Chunk, ...]
    packs: tuple[str, ...]
    layouts: tuple[dict[str, Any], ...] = ()
    metadata: dict[str, Any] = {}
    """Whatever the user gave, as JSON."""

    @property
    def nbytes(self) -> int:
        """Raw bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> int:
        """Bytes that its chunks take in packs."""
        return sum(chunk.length for chunk in self.chunks)

    def known(self) -> dict[str, tuple[str, Chunk]]:
        """Every chunk by its digest, with the name of its pack: what need not be written again."""
        return {chunk.digest: (self.packs[chunk.pack], chunk) for chunk in self.chunks}

    def layout(self, key: str) -> Layout | None:
        """The layout by which a tensor was saved, where that was noted."""
        index = self.tensors[key].layout
        return None if index is None else Layout.from_json(self.layouts[index])

    def encode(self) -> bytes:
        """The file. Raises `UsageError` if it is too large, or metadata are no JSON."""
        try:
            body = _lines(self)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"metadata of a checkpoint are JSON values: {error}") from None
        if len(body) > MAX_MANIFEST - 4096:
            raise UsageError(
                f"the manifest has {len(body)} bytes, over the limit of {MAX_MANIFEST}; put data in tensors"
            )
        return _head(digest(body).hex()) + body + _TAIL

    @classmethod
    def decode(cls, data: bytes, name: str) -> Self:
        """Read a file; `name` is for messages.

        Raises:
            UnknownFormat: it is of another format, or of a newer schema.
            CorruptFile: it is not whole, was altered, or says what cannot be.

        """
        head = _HEAD.match(data)
        if head is None or head[1].decode(errors="replace") != FORMAT:
            raise UnknownFormat(f"{name} is no manifest of a Ringhold checkpoint; check the path")
        if int(head[2]) > SCHEMA:
            raise UnknownFormat(
                f"{name} has schema {int(head[2])}; this version reads up to {SCHEMA}: upgrade Ringhold"
            )
        body = data[head.end() : -len(_TAIL)]
        if data[: head.end()] != _head(digest(body).hex()) or not data.endswith(_TAIL):
            raise CorruptFile(
                f"{name} was altered or cut short: its digest is not that of its content; take another step"
            )
        try:
            found = msgspec.json.decode(body, type=cls)
            _check(found)
        except (
            msgspec.MsgspecError,
            UnicodeDecodeError,
            RecursionError,
            UsageError,
            CorruptFile,
            OverflowError,
        ) as error:
            raise CorruptFile(f"{name} is malformed: {error}") from None
        return found


def check_pack_name(name: str) -> None:
    """Raise `CorruptFile` unless it is a plain name that stays in the store."""
    if not _PACK.fullmatch(name) or len(name) > 200:
        raise CorruptFile(f"{name!r} is no name of a pack")


def _head(hexadecimal: str) -> bytes:
    return f'{{"format": "{FORMAT}", "schema": {SCHEMA}, "blake3": "{hexadecimal}", "body":\n'.encode()


def _lines(manifest: Manifest) -> bytes:
    """The body: one line for each tensor, chunk, pack and layout."""
    encode = msgspec.json.encode

    def rows(values: Any) -> bytes:
        return b"[\n" + b",\n".join(map(encode, values)) + b"\n]"

    tensors = b",\n".join(encode(key) + b": " + encode(entry) for key, entry in manifest.tensors.items())
    parts = {
        "step": encode(manifest.step),
        "saved": encode(manifest.saved),
        "metadata": encode(manifest.metadata),
        "layouts": rows(manifest.layouts),
        "tensors": b"{\n" + tensors + b"\n}",
        "packs": rows(manifest.packs),
        "state": encode(manifest.state),
        "chunks": rows(manifest.chunks),
    }
    return b"{" + b",\n".join(encode(name) + b": " + part for name, part in parts.items()) + b"}"


def _check(manifest: Manifest) -> None:
    """Raise `CorruptFile` or `UsageError` if it says what cannot be."""
    if manifest.step < 0:
        raise CorruptFile(f"step {manifest.step}")
    for name in manifest.packs:
        check_pack_name(name)
    for chunk in manifest.chunks:
        _check_chunk(chunk, len(manifest.packs))
    for index in range(len(manifest.layouts)):
        Layout.from_json(manifest.layouts[index])
    for key, entry in manifest.tensors.items():
        try:
            _check_tensor(entry, manifest)
        except RingholdError as error:
            raise CorruptFile(f"tensor {key!r}: {error}") from None
    named = tensor_keys(manifest.state)
    if sorted(named) != sorted(manifest.tensors):
        odd = sorted(set(named) ^ set(manifest.tensors)) or sorted(named)
        raise CorruptFile(f"its state and its tensors differ at {odd[:3]}")


def _check_chunk(chunk: Chunk, packs: int) -> None:
    if not _HEX.fullmatch(chunk.digest):
        raise CorruptFile(f"{chunk.digest[:80]!r} is no digest")
    if not (0 < chunk.length <= chunk.size <= MAX_CHUNK and 0 <= chunk.offset < 1 << 62 and 0 <= chunk.pack < packs):
        raise CorruptFile(f"chunk {chunk.digest[:12]} is of an impossible size or place")


def _check_tensor(entry: TensorEntry, manifest: Manifest) -> None:
    if entry.dtype not in ITEMSIZE:
        raise UsageError(f"unknown dtype {entry.dtype!r}")
    if len(entry.shape) > _MAX_DIMS or any(not 0 <= extent < 1 << 48 for extent in entry.shape):
        raise UsageError("its shape is impossible")
    grid = entry.boxes
    if grid.count != len(entry.chunks):
        raise UsageError(f"its grid has {grid.count} chunks, it names {len(entry.chunks)}")
    if entry.layout is not None and not 0 <= entry.layout < len(manifest.layouts):
        raise UsageError(f"there is no layout {entry.layout}")
    size = ITEMSIZE[entry.dtype]
    for index, box in zip(entry.chunks, grid.boxes(), strict=True):
        if not 0 <= index < len(manifest.chunks):
            raise UsageError(f"there is no chunk {index}")
        if manifest.chunks[index].size != box.size * size:
            raise UsageError(f"chunk {index} has {manifest.chunks[index].size} bytes, its box {box.size * size}")
