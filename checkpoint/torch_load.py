"""Files that `torch.save` wrote, read without torch: the pickle through the restricted unpickler, tensors in place.

Three forms: the zip archive of today (a file of its own, or one at an offset inside of a `.distcp`), and the stream of
pickles followed by raw storages that torch wrote before 1.6. The readers of formats are the callers.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from checkpoint.checksums import Span
from checkpoint.dtypes import itemsize
from checkpoint.files import File
from checkpoint.lazy import Stored
from checkpoint.unpickle import StorageRef, TensorRef, base64_of, loads, to_json
from collectives.errors import CorruptFile

_END, _CENTRAL, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_PICKLE_LIMIT = 1 << 30
"""Bytes of a pickle beyond which a file is taken for damaged."""


@dataclass(frozen=True, slots=True)
class _Member:
    header: int
    size: int
    method: int
    crc: int


class TorchFile:
    """What `torch.save` wrote at bytes `[start, start + length)` of a file; all of it by default.

    `value` is the object, with a `TensorRef` for each tensor; `stored` says where a tensor's elements are.

    Raises:
        CorruptFile: it is no such file, or not whole.
        UnknownPickle: its pickle names what is not known.

    """

    def __init__(self, file: File, start: int = 0, length: int | None = None) -> None:
        self.file = file
        self._start = start
        self._length = file.size - start if length is None else length
        self._places: dict[str, tuple[int, int]] = {}
        if start + self._length > file.size or self._length < 0:
            raise CorruptFile(f"{file.path} has {file.size} bytes and should have {start + self._length}: truncated")
        head = file.read(start, min(4, self._length))
        if head == _LOCAL:
            self._members = self._directory()
            self.value = self._zip_value()
        else:
            self._members = {}
            self.value = self._legacy_value()

    def stored(self, tensor: TensorRef) -> Stored:
        """Return a tensor's elements. `CorruptFile`: they are not in the file."""
        offset, nbytes = self._place(tensor.storage)
        width = itemsize(tensor.dtype)
        count = (
            (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) + 1)
            if all(tensor.shape)
            else 0
        )
        if (tensor.offset + count) * width > nbytes:
            raise CorruptFile(
                f"{self.file.path}: a tensor of shape {tensor.shape} ends behind its storage of {nbytes} bytes; the "
                f"file is damaged"
            )
        return Stored(self.file, offset + tensor.offset * width, tensor.dtype, tensor.shape, tensor.strides)

    def json(self, value: Any, path: str) -> tuple[Any, list[str]]:
        """Return a value as JSON, small tensors too: `{"dtype", "shape", "base64"}`; and what is left out."""
        return to_json(self._inline(value), path)

    def _inline(self, value: Any) -> Any:
        if isinstance(value, TensorRef):
            stored = self.stored(value)
            if stored.size * itemsize(stored.dtype) > 1 << 16:
                return value
            return {"dtype": stored.dtype, "shape": stored.shape, "base64": base64_of(bytes(stored.whole()))}
        if isinstance(value, dict):
            return {key: self._inline(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._inline(item) for item in value]
        return value

    def _place(self, storage: StorageRef) -> tuple[int, int]:
        if storage.key not in self._places:
            name = f"{self._prefix}data/{storage.key}"
            if name not in self._members:
                raise CorruptFile(f"{self.file.path}: storage {storage.key!r} is missing; the file is damaged")
            offset, size = self._places[storage.key] = self._data(name)
            if self._members[name].crc:  # torch writes 0 where it was told not to compute it
                self.file.spans.add(Span(offset, size, self._members[name].crc, f"storage {storage.key}"))
        return self._places[storage.key]

    def _zip_value(self) -> Any:
        names = [name for name in self._members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(names) != 1:
            raise CorruptFile(f"{self.file.path}: not a file of torch.save: it has {len(names)} data.pkl")
        self._prefix = names[0].removesuffix("data.pkl")
        offset, size = self._data(names[0])
        order = self._members.get(self._prefix + "byteorder")
        if order is not None and self.file.read(*self._data(self._prefix + "byteorder")) != b"little":
            raise CorruptFile(f"{self.file.path}: written on a big-endian machine, which is not supported")
        if size > _PICKLE_LIMIT:
            raise CorruptFile(f"{self.file.path}: a pickle of {size} bytes; the file is damaged")
        pickle = self.file.read(offset, size)
        crc = self._members[names[0]].crc
        if crc and zlib.crc32(pickle) != crc:
            raise CorruptFile(f"{self.file.path}: its pickle does not have the checksum that was written with it")
        return loads(pickle, str(self.file.path))

    def _data(self, name: str) -> tuple[int, int]:
        """Offset in the file and size of a member."""
        member = self._members[name]
        if member.method != 0:
            raise CorruptFile(f"{self.file.path}: {name} is compressed, which torch.save never does")
        header = self.file.read(self._start + member.header, 30)
        if header[:4] != _LOCAL:
            raise CorruptFile(f"{self.file.path}: no zip member where the directory says; the file is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = self._start + member.header + 30 + name_length + extra_length
        if offset + member.size > self._start + self._length:
            raise CorruptFile(f"{self.file.path}: {name} ends behind the file: truncated")
        return offset, member.size

    def _directory(self) -> dict[str, _Member]:
        """Read the zip's central directory. The whole is not searched for members: only the directory counts."""
        tail_length = min(self._length, 22 + 65536)
        tail = self.file.read(self._start + self._length - tail_length, tail_length)
        at = tail.rfind(_END)
        if at < 0 or len(tail) - at < 22:
            raise CorruptFile(f"{self.file.path}: the archive's directory is missing: truncated; copy the file again")
        count, size, offset = struct.unpack("<HII", tail[at + 10 : at + 20])
        if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR64:
            (end64,) = struct.unpack("<Q", tail[at - 12 : at - 4])
            record = self._bytes(end64, 56)
            if record[:4] != _END64:
                raise CorruptFile(f"{self.file.path}: the archive's directory is damaged")
            count, size, offset = struct.unpack("<QQQ", record[32:56])
        directory = self._bytes(offset, size)
        members: dict[str, _Member] = {}
        at = 0
        for _ in range(count):
            if directory[at : at + 4] != _CENTRAL or at + 46 > len(directory):
                raise CorruptFile(f"{self.file.path}: the archive's directory is damaged")
            method = struct.unpack("<H", directory[at + 10 : at + 12])[0]
            (crc,) = struct.unpack("<I", directory[at + 16 : at + 20])
            _, full, name_length, extra_length, comment = struct.unpack("<IIHHH", directory[at + 20 : at + 34])
            (header,) = struct.unpack("<I", directory[at + 42 : at + 46])
            name = directory[at + 46 : at + 46 + name_length].decode("utf-8", "replace")
            extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
            full, header = _zip64(extra, full, header)
            members[name] = _Member(header, full, method, crc)
            at += 46 + name_length + extra_length + comment
        return members

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self._length:
            raise CorruptFile(f"{self.file.path}: the archive's directory is damaged: it ends behind the file")
        return self.file.read(self._start + offset, count)

    def _legacy_value(self) -> Any:
        """Magic number, protocol, system; the object; the keys of its storages; each storage's length and bytes."""
        import pickletools

        where = f"{self.file.path}"
        if self._length > _PICKLE_LIMIT:
            raise CorruptFile(f"{where}: not a file of torch.save")
        data, at, parts = self.file.read(self._start, self._length), 0, []
        try:
            for _ in range(5):
                end = at
                for _, _, position in pickletools.genops(data[at:]):
                    end = at + (position or 0) + 1
                parts.append(loads(data[at:end], where))
                at = end
        except (ValueError, IndexError):
            raise CorruptFile(f"{where}: not a file of torch.save, or truncated") from None
        if parts[0] != _LEGACY_MAGIC or not isinstance(parts[4], list):
            raise CorruptFile(f"{where}: not a file of torch.save")
        widths = {ref.key: itemsize(ref.dtype or "U8") for ref in _storages(parts[3])}
        for key in parts[4]:
            if at + 8 > len(data):
                raise CorruptFile(f"{where}: truncated; copy the file again")
            (count,) = struct.unpack("<q", data[at : at + 8])
            nbytes = count * widths.get(str(key), 1)
            self._places[str(key)] = (self._start + at + 8, nbytes)
            at += 8 + nbytes
        return parts[3]


def _zip64(extra: bytes, full: int, header: int) -> tuple[int, int]:
    """Take sizes and offsets beyond 4 GiB from a member's extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            values = iter(struct.unpack(f"<{length // 8}Q", extra[at + 4 : at + 4 + length // 8 * 8]))
            if full == 0xFFFFFFFF:
                full = next(values, full)
                next(values, None)  # the compressed size, which is the same
            if header == 0xFFFFFFFF:
                header = next(values, header)
        at += 4 + length
    return full, header


def _storages(value: Any) -> list[StorageRef]:
    if isinstance(value, TensorRef):
        return [value.storage]
    if isinstance(value, dict):
        return [ref for item in value.values() for ref in _storages(item)]
    if isinstance(value, list | tuple):
        return [ref for item in value for ref in _storages(item)]
    return []
