"""Files as `torch.save` writes them, written without torch: a zip of stored records, the pickle and one a tensor.

`write` streams a value, block by block, with correct checksums, and returns the bytes written, so that several such
files may lie one behind the other in one (DCP's `.distcp`). Used by the writers of DCP, DeepSpeed and Megatron
checkpoints. Format: PKZIP APPNOTE 6.3.10, and `caffe2/serialize/inline_container.cc` of PyTorch for the names of the
records and the alignment of 64 bytes.
"""

import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from checkpoint.dtypes import TORCH, itemsize
from checkpoint.pickling import Call, Made, Name, Persistent, dumps, ordered
from checkpoint.source import Bytes, Entry, Source, blocks
from collectives.region import Region

Raw: TypeAlias = bytes | memoryview

_ALIGNMENT = 64
_STREAMED = 0x0808  # flags: checksum and sizes follow the data; names are UTF-8
_ELSEWHERE = 0xFFFFFFFF
"""Stands for a number that is in a field of 64 bits."""
_LARGE = _ELSEWHERE
"""Numbers from here on are."""
_EPOCH = 0x21  # the first of January 1980, the zero of zip's calendar: files of one state are equal whenever written
_TORCH_NAMES = {ours: torch for torch, ours in TORCH.items()}
_STORAGES = {
    "F32": "FloatStorage", "F64": "DoubleStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C64": "ComplexFloatStorage", "C128": "ComplexDoubleStorage",
}  # fmt: skip
_DTYPES_OF_UNTYPED = frozenset({"U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor in a value: `read()` yields its row-major little-endian bytes, block after block."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


def saved(source: Source, entry: Entry, progress: Callable[[int], None]) -> Saved:
    """All of a tensor of a source; `progress` is told the bytes of every block that is read."""
    return saved_box(source, entry, Region.whole(entry.shape), progress)


def saved_box(source: Source, entry: Entry, box: Region, progress: Callable[[int], None]) -> Saved:
    """A box of a tensor of a source, as a tensor of its own."""

    def read() -> Iterator[Bytes]:
        for block in blocks(replace(entry, shape=box.shape)):
            start = tuple(map(int.__add__, block.start, box.start))
            stop = tuple(map(int.__add__, block.stop, box.start))
            yield source.read(entry.key, Region(start, stop))
            progress(block.size * itemsize(entry.dtype))

    return Saved(entry.dtype, box.shape, read)


def scalar(value: float, dtype: str = "F32") -> Saved:
    """A tensor of no dimensions: F32, F64 or I64."""
    raw = np.array(value, {"F32": "<f4", "F64": "<f8", "I64": "<i8"}[dtype]).reshape(1).view(np.uint8)
    return Saved(dtype, (), lambda: (raw,))


def torch_dtype(dtype: str) -> Name:
    """`torch.float32` for "F32", as a pickle names it."""
    return Name("torch", _TORCH_NAMES[dtype])


def write(out: int | None, value: Any, name: str = "archive") -> int:
    """Write a value to a file descriptor, where it stands, and return the number of bytes.

    Memory: a block of one tensor at a time.

    Args:
        out: a file open for writing; several threads may write several files at once. None: only count.
        value: what `pickling.dumps` takes, with `Saved` tensors anywhere in it.
        name: the folder of the records within the zip.

    """
    tensors: list[Saved] = []
    pickle = dumps(_named(value, tensors))
    archive = _Zip(out, name)
    archive.add("data.pkl", len(pickle), (pickle,))
    archive.add("byteorder", 6, (b"little",))
    for index, tensor in enumerate(tensors):
        archive.add(f"data/{index}", tensor.nbytes, (block.data for block in tensor.read()))
    archive.add("version", 2, (b"3\n",))
    return archive.finish()


def length(value: Any, name: str = "archive") -> int:
    """Bytes that `write` would write, without reading a tensor."""
    return write(None, value, name)


def _named(value: Any, tensors: list[Saved]) -> Any:
    """The value with every tensor replaced by how torch's pickles name one; the tensors are collected in order."""
    match value:
        case Saved():
            tensors.append(value)
            return _rebuild(value, str(len(tensors) - 1))
        case dict():
            return {key: _named(one, tensors) for key, one in value.items()}
        case list():
            return [_named(one, tensors) for one in value]
        case tuple():
            return tuple(_named(one, tensors) for one in value)
        case Call(items=items, state=state) if items is not None or state is not None:
            inner = None if items is None else {key: _named(one, tensors) for key, one in items.items()}
            return replace(value, items=inner, state=_named(state, tensors))
        case Made(state=state):
            return replace(value, state=_named(state, tensors))
    return value


def _rebuild(tensor: Saved, number: str) -> Call:
    stride = tuple(math.prod(max(1, size) for size in tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape)))
    tail = (0, tensor.shape, stride, False, ordered({}))
    if tensor.dtype in _DTYPES_OF_UNTYPED:
        kept = Persistent(("storage", Name("torch.storage", "UntypedStorage"), number, "cpu", tensor.nbytes))
        return Call(Name("torch._utils", "_rebuild_tensor_v3"), (kept, *tail, torch_dtype(tensor.dtype)))
    storage = Name("torch", _STORAGES[tensor.dtype])
    kept = Persistent(("storage", storage, number, "cpu", math.prod(tensor.shape)))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (kept, *tail))


class _Zip:
    """A zip under way: each record with header, aligned data and trailer; then the directory."""

    def __init__(self, out: int | None, name: str) -> None:
        self._out, self._name = out, name
        self._at = 0
        self._directory: list[bytes] = []

    def add(self, record: str, size: int, data: Iterable[Raw]) -> None:
        name = f"{self._name}/{record}".encode()
        start = self._at
        large = size >= _LARGE
        # The sizes are 64 bits wide in the trailer only if the header has the field that says so.
        wide = struct.pack("<HHQQ", 1, 16, 0, 0) if large else b""
        room = 30 + len(name) + len(wide) + 4
        filler = -(start + room) % _ALIGNMENT
        extra = wide + b"FB" + struct.pack("<H", filler) + b"Z" * filler
        sizes = _ELSEWHERE if large else 0
        head = struct.pack("<4s5H3I2H", b"PK\3\4", 45 if large else 20, _STREAMED, 0, 0, _EPOCH, 0, sizes, sizes, len(name), len(extra))  # fmt: skip # noqa: E501
        pending: list[Raw] = [head + name + extra]
        checksum = 0
        if self._out is None:
            self._at += size
            data = ()
        for block in data:
            checksum = zlib.crc32(block, checksum)
            pending.append(block)
            if len(pending) > 2:
                self._send(pending)
                pending = []
        pending.append(struct.pack("<4sIQQ" if large else "<4sIII", b"PK\7\10", checksum, size, size))
        self._send(pending)
        self._directory.append(_listing(name, checksum, size, start))

    def finish(self) -> int:
        """Write the directory and return the length of all."""
        at, directory = self._at, b"".join(self._directory)
        count, length = len(self._directory), len(directory)
        tail = b""
        if at >= _LARGE or count >= 0xFFFF:
            tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, at)
            tail += struct.pack("<4sIQI", b"PK\6\7", 0, at + length, 1)
        narrow = min(count, 0xFFFF)
        tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, narrow, narrow, length, _short(at), 0)
        self._send([directory + tail])
        return self._at

    def _send(self, parts: list[Raw]) -> None:
        self._at += sum(map(len, parts)) if self._out is None else send(self._out, parts)


def send(out: int, parts: list[Raw]) -> int:
    """Write all of some buffers to a file descriptor, with as few calls as it takes, and return their bytes."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    total = sum(view.nbytes for view in views)
    while views:
        done = os.writev(out, views)
        while views and done >= views[0].nbytes:
            done -= views.pop(0).nbytes
        if done:
            views[0] = views[0][done:]
    return total


def _short(number: int) -> int:
    return _ELSEWHERE if number >= _LARGE else number


def _listing(name: bytes, checksum: int, size: int, start: int) -> bytes:
    """One line of a zip's directory."""
    wide = b"".join(struct.pack("<Q", number) for number in (size, size, start) if number >= _LARGE)
    extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
    short = _short(size)
    version = 45 if wide else 20
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", version, version, _STREAMED, 0, 0, _EPOCH, checksum, short, short, len(name), len(extra), 0, 0, 0, 0, _short(start)) + name + extra  # fmt: skip # noqa: E501
