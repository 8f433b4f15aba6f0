"""The files of torch.distributed.checkpoint: items one behind the other, and the `.metadata` that says where they lie.

Used by the writers of DCP folders and of Megatron's `torch_dist`, which is DCP with other keys. Nothing is imported of
torch: `.metadata` is a pickle that names its classes. Source: `torch/distributed/checkpoint/{metadata,filesystem}.py`
of torch 2.13.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

from checkpoint.formats.output import Output, at_once
from checkpoint.pickling import Call, Made, Name, Pairs, dumps
from checkpoint.torch_file import Saved, torch_dtype
from collectives.region import Region

StatePath: TypeAlias = tuple[str | int, ...]
"""Where a value was in the nested state that DCP flattened."""

_METADATA = "torch.distributed.checkpoint.metadata"
_PROPERTIES = {
    "layout": Call(Name("torch.serialization", "_get_layout"), ("torch.strided",)),
    "memory": Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,)),
}


@dataclass(frozen=True, slots=True)
class Item:
    """What lies in one place of one file: the `box` of a tensor, or a plain value (no box)."""

    key: str
    value: Saved | Any
    box: Region | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item was written."""

    item: Item
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor as the metadata describes it: dtype and shape of all of it."""

    dtype: str
    shape: tuple[int, ...]


class Spread:
    """Items spread over files, each into the one of a range of files that has the fewest bytes so far."""

    def __init__(self, count: int) -> None:
        self.files: list[list[Item]] = [[] for _ in range(count)]
        self._loads = [0] * count

    def add(self, item: Item, among: range) -> None:
        """Put an item into one of the files `among`."""
        number = min(among, key=self._loads.__getitem__)
        self.files[number].append(item)
        self._loads[number] += item.value.nbytes if isinstance(item.value, Saved) else 0


def write_files(output: Output, files: Mapping[str, Sequence[Item]]) -> list[Place]:
    """Write files, by name, several at once, and say where every item lies."""

    def write(name: str) -> list[Place]:
        lengths = output.write(name, [item.value for item in files[name]])
        starts = accumulate(lengths, initial=0)
        return [Place(item, name, at, length) for item, at, length in zip(files[name], starts, lengths, strict=False)]

    return [place for places in at_once(write, files) for place in places]


def metadata(
    tensors: Mapping[str, Whole],
    places: Iterable[Place],
    paths: Mapping[str, StatePath] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> bytes:
    """Return the bytes of `.metadata`.

    Args:
        tensors: every tensor by its key.
        places: where the items are; those of one tensor cover it.
        paths: of every key, aliases too; what DCP's planner puts a nested state together by. None: keys are flat.
        aliases: further keys of tensors, and the key that has the bytes.

    """
    by_key: dict[str, list[Place]] = {}
    for place in places:
        by_key.setdefault(place.item.key, []).append(place)
    by_key |= {alias: by_key[owner] for alias, owner in (aliases or {}).items()}
    wholes = dict(tensors) | {alias: tensors[owner] for alias, owner in (aliases or {}).items()}
    state: dict[str, Made] = {}
    stored: list[tuple[Made, Made]] = []
    for key, found in by_key.items():
        boxes = [place.item.box for place in found if place.item.box is not None]
        state[key] = _tensor(wholes[key], boxes) if boxes else Made(Name(_METADATA, "BytesStorageMetadata"), {})
        stored += [(_index(key, place.item.box, number), _stored(place)) for number, place in enumerate(found)]
    root = {
        "state_dict_metadata": state,
        "planner_data": None if paths is None else dict(paths),
        "storage_data": Pairs(tuple(stored)),
        "storage_meta": Made(
            Name(_METADATA, "StorageMeta"), {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
        ),
        "version": "1.0.0",
    }
    return dumps(Made(Name(_METADATA, "Metadata"), root))


def _tensor(whole: Whole, boxes: Sequence[Region]) -> Made:
    properties = (torch_dtype(whole.dtype), _PROPERTIES["layout"], False, _PROPERTIES["memory"], False)
    chunks = [
        Made(Name(_METADATA, "ChunkStorageMetadata"), {"offsets": _size(box.start), "sizes": _size(box.shape)})
        for box in boxes
    ]
    return Made(
        Name(_METADATA, "TensorStorageMetadata"),
        {
            "properties": Made(Name(_METADATA, "TensorProperties"), properties),
            "size": _size(whole.shape),
            "chunks": chunks,
        },
    )


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (shape,))


def _index(key: str, box: Region | None, number: int) -> Made:
    offset = None if box is None else _size(box.start)
    index = None if box is None else number
    return Made(Name(_METADATA, "MetadataIndex"), {"fqn": key, "index": index, "offset": offset})


def _stored(place: Place) -> Made:
    state = {"relative_path": place.file.rpartition("/")[2], "offset": place.offset, "length": place.length}
    return Made(Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)
