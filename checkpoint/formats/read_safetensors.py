"""Reads safetensors files: one, a folder of shards with `model.safetensors.index.json`, and DCP's HF writer's shards.

Every tensor is a `param` unless its key says `NAME|STATE`, as the `plain` writer's keys do. Names that another one
stands for (`{"lm_head.weight": "wte.weight"}` in a file's metadata, as huggingface_hub writes it) are tied to it. A
shard of DCP's HF writer keeps the place of each part in its metadata. Format: safetensors' README. Found by `detect`.
"""

import json
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoint.dtypes import ITEMSIZE
from checkpoint.files import File, Files, Unreadable
from checkpoint.formats.gathered import Gathered, tied
from checkpoint.language import Spec, cleaned
from checkpoint.lazy import Lazy, Part, Placed, Stored
from checkpoint.source import PARAM, STEP, Group
from collectives.errors import CorruptFile
from collectives.region import Region

_HEADER_LIMIT = 100_000_000
"""Bytes of a header at most, as safetensors itself has it."""
INDEX = "model.safetensors.index.json"
GROUPS, EXTRAS = "ringhold.groups", "ringhold.extras"
"""Keys of a file's metadata under which the `plain` writer keeps what is no tensor."""
_PLACES = "DCP_SHARDING_INFO"
_STATES = frozenset({PARAM, "fp32", "frozen", STEP, "exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq"})


def is_folder(folder: Path) -> bool:
    """Whether it is such a file, or a folder with some."""
    if folder.is_file():
        with folder.open("rb") as file:
            head = file.read(9)
        return folder.suffix == ".safetensors" or (len(head) == 9 and head[6:8] == b"\0\0" and head[8:] == b"{")
    return any(path.suffix == ".safetensors" for path in folder.iterdir()) or any(
        path.name.endswith(".safetensors.index.json") for path in folder.iterdir()
    )


def read(folder: Path, spec: Spec | None = None) -> Gathered:
    """Open a file or folder.

    Raises:
        CorruptFile: a file is not whole, or does not fit its index.

    """
    files = Files()
    try:
        return _gather(folder, files)
    except BaseException:
        files.close()
        raise


def _gather(folder: Path, files: Files) -> Gathered:
    wanted, paths, notes = _files(folder)
    headers = {path: Header(files.get(path)) for path in paths}
    for name, file in wanted.items():
        if name not in headers[file].tensors:
            raise CorruptFile(f"{file} does not hold {name}, which the index says it does; copy the checkpoint again")
    source = Gathered("hf", files)
    aliases: dict[str, str] = {}
    parts: dict[str, list[tuple[dict[str, Any] | None, Stored]]] = {}
    names = Spec.built_in("hf")
    for path, header in headers.items():
        places = _json(header.metadata.get(_PLACES), path)
        for name, tensor in header.tensors.items():
            if not wanted or wanted.get(name) == path:
                parts.setdefault(name, []).append((places.get(name), tensor))
        notes = {**header.metadata, **notes}
    for key, stored in parts.items():
        name, _, state = key.rpartition("|")
        known = state in _STATES and name
        source.add(cleaned(names, name if known else key), state if known else PARAM, _whole(key, stored))
    for alias, owner in notes.items():
        if owner in parts and alias not in parts:
            whole = cleaned(names, owner)
            aliases[cleaned(names, alias)] = whole
            source.add(cleaned(names, alias), PARAM, source.tensor(f"{whole}|{PARAM}"))
    _kept(source, headers)
    if aliases:
        source.extras["tied"] = tied(aliases)
    return source


def _kept(source: Gathered, headers: Mapping[Path, "Header"]) -> None:
    """Groups and extras that the `plain` writer kept."""
    for path, header in headers.items():
        source.groups = source.groups or [
            Group(tuple(row["names"]), row["options"]) for row in _json(header.metadata.get(GROUPS), path, list)
        ]
        source.extras |= _json(header.metadata.get(EXTRAS), path)


def _files(folder: Path) -> tuple[dict[str, Path], list[Path], dict[str, str]]:
    """The file of each tensor, where an index says so; all files; the index's metadata."""
    if folder.is_file():
        return {}, [folder], {}
    indices = sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors.index.json"))
    if not indices:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
        if not paths:
            raise Unreadable(f"{folder}: no safetensors file in it")
        return {}, paths, {}
    try:
        table = json.loads(indices[0].read_text())
        wanted = {str(name): str(file) for name, file in table["weight_map"].items()}
        notes = {str(key): str(value) for key, value in (table.get("metadata") or {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{indices[0]}: not an index of safetensors files ({error})") from None
    for file in set(wanted.values()):
        if Path(file).name != file or not file:
            raise CorruptFile(f"{indices[0]} names {file!r}, which is not beside it; nothing outside is read")
        if not (folder / file).is_file():
            raise Unreadable(f"{folder / file} is missing, which {indices[0].name} names; copy the checkpoint whole")
    paths = sorted({folder / file for file in wanted.values()})
    return {name: folder / file for name, file in wanted.items()}, paths, notes


class Header:
    """The header of a safetensors file: its tensors in place, and its metadata.

    Raises:
        CorruptFile: it is not one, or not whole.

    """

    def __init__(self, file: File) -> None:
        if file.size < 8:
            raise CorruptFile(f"{file.path}: {file.size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", file.read(0, 8))
        if length > min(_HEADER_LIMIT, file.size - 8):
            raise CorruptFile(f"{file.path}: a header of {length} bytes in {file.size}: not safetensors, or truncated")
        try:
            table = json.loads(file.read(8, length))
            metadata = table.pop("__metadata__", {})
            self.metadata = {str(key): str(value) for key, value in metadata.items()}
            self.tensors = {name: _stored(file, 8 + length, name, row) for name, row in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptFile(f"{file.path}: its header is damaged ({error})") from None
        spans = sorted((tensor.offset, tensor.offset + _nbytes(tensor)) for tensor in self.tensors.values())
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            raise CorruptFile(f"{file.path}: tensors lie over each other; its header is damaged")


def _stored(file: File, base: int, name: str, row: Mapping[str, Any]) -> Stored:
    dtype, shape, (start, stop) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if dtype not in ITEMSIZE or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has dtype {dtype}, shape {shape}, offsets {start} to {stop}")
    tensor = Stored.packed(file, base + start, dtype, shape)
    if _nbytes(tensor) != stop - start:
        raise ValueError(f"{name} has {stop - start} bytes, and {_nbytes(tensor)} for its shape {shape}")
    return tensor


def _nbytes(tensor: Stored) -> int:
    return tensor.size * ITEMSIZE[tensor.dtype]


def _whole(name: str, parts: list[tuple[dict[str, Any] | None, Stored]]) -> Lazy:
    """A tensor of which several files may hold parts, each with the place of its own."""
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    boxes = []
    for place, tensor in parts:
        start = tuple((place or {}).get("saved_offsets", ()))
        if len(start) != len(tensor.shape) or any(type(n) is not int or n < 0 for n in start):
            raise CorruptFile(f"{name} is in several files, and {tensor.file.path} does not say which part it holds")
        boxes.append(Region(start, tuple(a + b for a, b in zip(start, tensor.shape, strict=True))))
    shape = tuple(max(box.stop[dim] for box in boxes) for dim in range(len(boxes[0].start)))
    tensors = [tensor for _, tensor in parts]
    return Placed(name, shape, [Part(b, t, (0,) * len(shape)) for b, t in zip(boxes, tensors, strict=True)])


def _json(text: str | None, path: Path, kind: type[Any] = dict) -> Any:
    if not text:
        return kind()
    try:
        found = json.loads(text)
    except ValueError:
        raise CorruptFile(f"{path}: its metadata is damaged") from None
    if not isinstance(found, kind):
        raise CorruptFile(f"{path}: its metadata is damaged")
    return found
