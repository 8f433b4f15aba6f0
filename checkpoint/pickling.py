"""Pickles written opcode by opcode, of classes that are named but never imported: torch's, DeepSpeed's, Megatron's.

`dumps` writes plain values and, among them, the nodes below: `Name` (a class or function of a library), `Call` (what a
function returns), `Made` (an instance without its constructor, with state), `Pairs` (a dict of such keys) and
`Persistent` (what torch's files keep beside the pickle). Protocol 2, because it is what torch's own weights-only reader
knows. Used by `torch_file` and by the writers of foreign formats.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from collectives.errors import UsageError


@dataclass(frozen=True, slots=True)
class Name:
    """A class, function or other global of a module, as `module.name`."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What `function(*arguments)` returns; then, if given, `items` set in it or `state` given to it."""

    function: Name
    arguments: tuple[Any, ...] = ()
    items: Mapping[Any, Any] | None = None
    state: Any = None


@dataclass(frozen=True, slots=True)
class Made:
    """An instance of `kind`, made without its constructor and given `state` (a dict of attributes, most often)."""

    kind: Name
    state: Any


@dataclass(frozen=True, slots=True)
class Persistent:
    """A value that the pickle names by an identifier and the file keeps elsewhere."""

    identifier: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys may be nodes of this module."""

    items: tuple[tuple[Any, Any], ...]


def ordered(items: Mapping[Any, Any]) -> Call:
    """A `collections.OrderedDict` of these items."""
    return Call(Name("collections", "OrderedDict"), (), items)


def dumps(value: Any) -> bytes:
    """Return the pickle of a value: None, bool, int, float, str, bytes, tuple, list, dict, and the nodes above.

    Raises:
        UsageError: there is something else in it.

    """
    return _Emitter().run(value)


class _Emitter:
    """Appends opcodes to a buffer; strings and names are written once and then fetched from the memo."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[Any, int] = {}

    def run(self, value: Any) -> bytes:
        self._value(value)
        return bytes(self._out + b".")

    def _value(self, value: Any) -> None:
        writer = _WRITERS.get(type(value))
        if writer is None:
            raise UsageError(f"a {type(value).__name__} cannot be written into a pickle without its library")
        writer(self, value)

    def _recall(self, key: Any) -> bool:
        """Fetch what was remembered under `key`, if anything was."""
        slot = self._memo.get(key)
        if slot is None:
            return False
        self._out += b"h" + bytes((slot,)) if slot < 256 else b"j" + struct.pack("<I", slot)
        return True

    def _remember(self, key: Any) -> None:
        slot = self._memo[key] = len(self._memo)
        self._out += b"q" + bytes((slot,)) if slot < 256 else b"r" + struct.pack("<I", slot)

    def none(self, _: None) -> None:
        self._out += b"N"

    def boolean(self, value: bool) -> None:
        self._out += b"\x88" if value else b"\x89"

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self._out += b"K" + bytes((value,))
        elif -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 255:
                raise UsageError(f"an integer of {len(raw)} bytes is too long for a pickle's short form")
            self._out += b"\x8a" + bytes((len(raw),)) + raw

    def floating(self, value: float) -> None:
        self._out += b"G" + struct.pack(">d", value)

    def text(self, value: str) -> None:
        if not self._recall(value):
            raw = value.encode("utf-8", "surrogatepass")
            self._out += b"X" + struct.pack("<I", len(raw)) + raw
            self._remember(value)

    def raw(self, value: bytes) -> None:
        # Protocol 2 has no bytes; this is how Python's own pickler spells them.
        self.call(Call(Name("_codecs", "encode"), (value.decode("latin-1"), "latin1")))

    def tuple_(self, value: tuple[Any, ...]) -> None:
        if 0 < len(value) < 4:
            for one in value:
                self._value(one)
            self._out += b"\x85\x86\x87"[len(value) - 1 : len(value)]
        elif value:
            self._out += b"("
            for one in value:
                self._value(one)
            self._out += b"t"
        else:
            self._out += b")"

    def list_(self, value: Iterable[Any]) -> None:
        self._out += b"](" if value else b"]"
        for one in value:
            self._value(one)
        self._out += b"e" if value else b""

    def dict_(self, value: Mapping[Any, Any]) -> None:
        self._out += b"}"
        self._items(tuple(value.items()))

    def pairs(self, value: Pairs) -> None:
        self._out += b"}"
        self._items(value.items)

    def _items(self, value: tuple[tuple[Any, Any], ...]) -> None:
        if value:
            self._out += b"("
            for key, one in value:
                self._value(key)
                self._value(one)
            self._out += b"u"

    def name(self, value: Name) -> None:
        if not self._recall(value):
            self._out += f"c{value.module}\n{value.name}\n".encode()
            self._remember(value)

    def call(self, value: Call) -> None:
        self.name(value.function)
        self.tuple_(value.arguments)
        self._out += b"R"
        if value.items is not None:
            self._items(tuple(value.items.items()))
        if value.state is not None:
            self._value(value.state)
            self._out += b"b"

    def made(self, value: Made) -> None:
        self.name(value.kind)
        self._out += b")\x81"
        self._value(value.state)
        self._out += b"b"

    def persistent(self, value: Persistent) -> None:
        self._value(value.identifier)
        self._out += b"Q"


_WRITERS: dict[type, Any] = {
    type(None): _Emitter.none,
    bool: _Emitter.boolean,
    int: _Emitter.integer,
    float: _Emitter.floating,
    str: _Emitter.text,
    bytes: _Emitter.raw,
    tuple: _Emitter.tuple_,
    list: _Emitter.list_,
    dict: _Emitter.dict_,
    Name: _Emitter.name,
    Call: _Emitter.call,
    Made: _Emitter.made,
    Pairs: _Emitter.pairs,
    Persistent: _Emitter.persistent,
}
