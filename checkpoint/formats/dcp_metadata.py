"""The `.metadata` of a folder of torch.distributed.checkpoint, and its tensors in place.

The pickle holds for each tensor its size, dtype and chunks, and for each chunk and object a file, offset and length. A
stored item is what `torch.save` writes, or that through transforms (`stream.zstd` of `_extension.py`). Source:
`torch/distributed/checkpoint/{metadata,filesystem,_extension}.py` of torch 2.13.
Used by the readers of DCP and of Megatron's `torch_dist`.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from checkpoint.dtypes import itemsize
from checkpoint.files import Files, Memory
from checkpoint.lazy import Elements, Given, Lazy, Part, PiecesMissing, Placed, Stored, carrier, slices
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import Dtype, Opaque, TensorRef, loads
from collectives.errors import CorruptFile, UnknownFormat
from collectives.region import Region

METADATA = ".metadata"
_OBJECT_LIMIT = 1 << 28
"""Bytes of an object that is no tensor, unpacked."""
_KEPT = 8
"""Compressed items that are kept unpacked at a time."""


@dataclass(frozen=True, slots=True)
class Item:
    """Where a chunk or an object is stored."""

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and its place in the files."""

    box: Region
    item: Item


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor: dtype, shape, chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Metadata:
    """A folder's metadata.

    `tensors` by key, `objects` (their items) by key, `paths` the path of each key in the nested state it was made of.

    Raises:
        CorruptFile: the metadata is damaged, names a file outside of the folder, or a chunk is stored nowhere.
        Unreadable: it is missing.

    """

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self._files = folder, files
        path = folder / METADATA
        file = files.get(path)
        value = loads(file.read(0, file.size), str(path))
        try:
            self.tensors, self.objects = self._tables(value, path)
            self.paths = _paths(value.get("planner_data"))
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise CorruptFile(f"{path}: not the metadata of a DCP checkpoint ({error!r})") from None
        self._unpacked: dict[Item, bytes] = {}

    def _tables(self, value: Any, path: Path) -> tuple[dict[str, Whole], dict[str, Item]]:
        places: dict[tuple[str, tuple[int, ...] | None], Item] = {}
        for index, info in value.get("storage_data").items():
            offset = index.get("offset")
            places[index.get("fqn"), None if offset is None else tuple(offset)] = self._item(info, path)
        tensors: dict[str, Whole] = {}
        objects: dict[str, Item] = {}
        for key, entry in value.get("state_dict_metadata").items():
            chunks = entry.get("chunks")
            if chunks is None:
                if (key, None) in places:
                    objects[key] = places[key, None]
                continue
            shape = _ints(entry.get("size"))
            tensors[key] = Whole(_dtype(entry, key), shape, tuple(_chunk(key, chunk, places, path) for chunk in chunks))
        return tensors, objects

    def _item(self, info: Any, path: Path) -> Item:
        name = info.get("relative_path")
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise CorruptFile(f"{path} names {name!r}, which is not within the folder; nothing outside is read")
        offset, length = info.get("offset"), info.get("length")
        if type(offset) is not int or type(length) is not int:
            raise CorruptFile(f"{path}: {name} has no offset and length")
        transforms = tuple(info.get("transform_descriptors") or ())
        return Item(name, offset, length, transforms)

    def tensor(self, key: str) -> Lazy:
        """Return a tensor, checked against the files that hold it.

        Raises:
            CorruptFile, Unreadable: a file is missing, truncated, or holds something else.
            PiecesMissing: its chunks do not make it up.

        """
        whole = self.tensors[key]
        parts = [
            Part(chunk.box, self._stored(key, chunk, whole.dtype), (0,) * len(whole.shape))
            for chunk in whole.chunks
            if not chunk.box.empty
        ]
        if len(parts) == 1 and parts[0].box == Region.whole(whole.shape):
            return parts[0].tensor
        if not parts and 0 in whole.shape:
            return Given(b"", whole.dtype, whole.shape)
        return Placed(key, whole.shape, parts)

    def _stored(self, key: str, chunk: Chunk, dtype: str) -> Lazy:
        item = chunk.item
        file = self._files.get(self.folder / item.file)
        if item.transforms:
            return _Packed(self, key, item, dtype, chunk.box.shape)
        loaded = TorchFile(file, item.offset, item.length)
        return _shaped(key, loaded, chunk.box.shape, dtype)

    def unpacked(self, item: Item) -> bytes:
        """Return the bytes of an item whose transforms are undone."""
        if item not in self._unpacked:
            data = self._files.get(self.folder / item.file).read(item.offset, item.length)
            for transform in reversed(item.transforms):
                data = _undo(transform, data, f"{self.folder / item.file}")
            while len(self._unpacked) >= _KEPT:
                self._unpacked.pop(next(iter(self._unpacked)), None)
            self._unpacked[item] = data
        return self._unpacked.get(item) or self.unpacked(item)

    def object(self, key: str) -> tuple[Any, "TorchFile"]:
        """Return an object that is no tensor, and the file that its tensors are in."""
        item = self.objects[key]
        if not item.transforms:
            loaded = TorchFile(self._files.get(self.folder / item.file), item.offset, item.length)
            return loaded.value, loaded
        loaded = TorchFile(Memory(self.folder / item.file, self.unpacked(item)))
        return loaded.value, loaded


class _Packed(Lazy):
    """A chunk that is stored compressed: unpacked when it is read, and kept for the reads that follow."""

    def __init__(self, metadata: Metadata, key: str, item: Item, dtype: str, shape: tuple[int, ...]) -> None:
        self._metadata, self._key, self._item, self.dtype, self.shape = metadata, key, item, dtype, shape

    def fill(self, box: Region, out: Elements) -> None:
        """Write the elements of a box into `out`."""
        memory = Memory(self._metadata.folder / self._item.file, self._metadata.unpacked(self._item))
        whole = _shaped(self._key, TorchFile(memory), self.shape, self.dtype)
        out[...] = whole.whole().view(carrier(self.dtype)).reshape(self.shape)[slices(box)]


def _shaped(key: str, loaded: TorchFile, shape: tuple[int, ...], dtype: str) -> Stored:
    if not isinstance(loaded.value, TensorRef):
        raise CorruptFile(f"{loaded.file.path}: {key} is no tensor there")
    stored = loaded.stored(loaded.value)
    if stored.dtype != dtype or (stored.shape != shape and math.prod(stored.shape) != math.prod(shape)):
        raise CorruptFile(
            f"{loaded.file.path}: {key} is stored as {stored.dtype} {stored.shape}, the metadata says {dtype} {shape}"
        )
    return stored if stored.shape == shape else Stored.packed(stored.file, stored.offset, dtype, shape)


def _undo(transform: str, data: bytes, where: str) -> bytes:
    """Undo one transform of a stream: `stream.zstd`, as the extension describes itself."""
    if not str(transform).startswith("stream.zstd"):
        raise UnknownFormat(f"{where}: it was written through {transform!r}, which Ringhold does not know")
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
        out = bytearray()
        while piece := reader.read(1 << 20):
            out += piece
            if len(out) > max(_OBJECT_LIMIT, 1024 * len(data)):
                raise CorruptFile(f"{where}: an item unpacks to more than {len(out)} bytes; it is damaged or an attack")
    except zstandard.ZstdError as error:
        raise CorruptFile(f"{where}: an item cannot be unpacked: {error}") from None
    return bytes(out)


def _chunk(key: str, chunk: Any, places: Mapping[tuple[str, tuple[int, ...] | None], Item], path: Path) -> Chunk:
    start, size = _ints(chunk.get("offsets")), _ints(chunk.get("sizes"))
    box = Region(start, tuple(a + b for a, b in zip(start, size, strict=True)))
    item = places.get((key, start)) or places.get((key, None))
    if item is None:
        raise PiecesMissing(f"{path}: the part of {key} at {start} is stored in no file; a rank's metadata is missing")
    return Chunk(box, item)


def _dtype(entry: Any, key: str) -> str:
    properties = entry.get("properties")
    found = properties.get("dtype") if isinstance(properties, Opaque) else None
    if found is None and isinstance(properties, Opaque):
        state = properties.state if isinstance(properties.state, tuple | list) else properties.args
        found = next((value for value in state if isinstance(value, Dtype)), None)
    if not isinstance(found, Dtype):
        raise ValueError(f"{key} has no dtype")
    itemsize(found)
    return str(found)


def _paths(planner: Any) -> dict[str, tuple[Any, ...]]:
    return {key: tuple(path) for key, path in planner.items()} if isinstance(planner, dict) else {}


def _ints(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if any(type(n) is not int or n < 0 for n in found):
        raise ValueError(f"{found} is no shape or offset")
    return found
