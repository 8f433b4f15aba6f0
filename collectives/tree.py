"""A state as a tree: taken apart into a packed skeleton and tensors, read back from it, and put together in place.

`collectives.state` hashes what `flatten` gives; `collectives.sync` sends skeletons to peers, who `parse` them and
`refill` their own state (`collectives.assembly`). A state is a dict (keys str or int) of dicts, lists, tuples, tensors
and plain values; whatever else it holds is refused by name.

The skeleton is everything but the tensors' values, in canonical msgpack. Plain values stand for themselves; all else
is an array that starts with a tag:

    ["d", key, value, ...]   dict; int keys ascending, then str keys ascending by code point
    ["l", value, ...]        list                ["t", value, ...]     tuple
    ["i", bytes]             int beyond 64 bits: two's complement, little-endian, as short as can be
    ["x", dtype, size, ...]  tensor and its shape; the n-th of these is the n-th tensor in canonical order

Two states have the same skeleton and tensors of the same bits exactly if they are equal to the bit. The order in which
a dict was filled does not count. Nothing is ever unpickled, and a skeleton from a peer is checked node by node.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from torch import Tensor

from collectives import rawbytes
from collectives.errors import ProtocolError, UsageError

Path: TypeAlias = tuple[str | int, ...]
"""Where a node stands: dict keys and list indices from the root."""
Node: TypeAlias = Any
"""A dict, list, tuple or plain value; in a `Tree` a `Slot` where a tensor stands."""

MAX_DEPTH = 64
MAX_SKELETON = 1 << 28
"""Most bytes of a skeleton; larger data belong in tensors."""
MAX_TENSOR = 1 << 48
"""Most raw bytes of one tensor that a skeleton may announce."""

_WORD = range(-(1 << 63), 1 << 64)
"""The ints that msgpack knows."""
_NOTHING: Final = object()
"""Stands for the old value where there is none."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of tensor number `index` (in canonical order) in a tree."""

    index: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Raw bytes of the tensor."""
        return math.prod(self.shape) * rawbytes.DTYPES[self.dtype].itemsize


class Flat(NamedTuple):
    """A state taken apart; `tensors` in canonical order, shared with the state."""

    skeleton: bytes
    tensors: tuple[Tensor, ...]


class Tree(NamedTuple):
    """A skeleton read back: the nest with a `Slot` for each tensor, and these slots with their paths, in order."""

    root: dict[str | int, Node]
    slots: tuple[Slot, ...]
    paths: tuple[Path, ...]


def flatten(state: dict[Any, Any]) -> Flat:
    """Take a state apart; nothing is copied.

    Raises:
        UsageError: something in the state is no shareable data; the message gives its path. Also for a nest deeper
            than `MAX_DEPTH` (a dict that holds itself, say) and for a skeleton of more than `MAX_SKELETON` bytes.

    """
    if not isinstance(state, dict):
        raise UsageError(f"a state must be a dict, not a {type(state).__qualname__}; put it into one")
    tensors: list[Tensor] = []
    skeleton = msgspec.msgpack.encode(_pack(state, (), tensors))
    if len(skeleton) > MAX_SKELETON:
        raise UsageError(
            f"the state has {len(skeleton)} bytes outside of tensors, over the limit of {MAX_SKELETON}; "
            f"keep bulk data in tensors"
        )
    return Flat(skeleton, tuple(tensors))


def parse(skeleton: bytes) -> Tree:
    """Read a skeleton, also one that comes from a peer.

    Raises:
        ProtocolError: it is not one that `flatten` could have made.

    """
    if len(skeleton) > MAX_SKELETON:
        raise ProtocolError(f"a skeleton of {len(skeleton)} bytes is over the limit of {MAX_SKELETON}")
    try:
        packed = msgspec.msgpack.decode(skeleton)
    except (ValueError, RecursionError) as error:  # DecodeError is a ValueError, and so is bad Unicode
        raise ProtocolError(f"the skeleton of a state is malformed: {error}") from None
    slots: list[Slot] = []
    paths: list[Path] = []
    root = _unpack(packed, (), slots, paths)
    if not isinstance(root, dict):
        raise ProtocolError("the skeleton of a state does not start with a dict")
    return Tree(root, tuple(slots), tuple(paths))


def tokens(tree: Tree, leaf_digests: Sequence[bytes]) -> dict[Path, bytes]:
    """Every node by its path, with bytes that are equal exactly if the nodes are; `leaf_digests` are the tensors'.

    A container counts for its kind alone, so that a dict that gained a key differs at that key only.
    """
    return dict(_tokens(tree.root, (), leaf_digests))


def differing(states: Sequence[dict[Path, bytes]]) -> tuple[str, ...]:
    """Names of the nodes at which states differ, from their `tokens`; where a whole part differs, of its root only."""
    differ: set[Path] = set()
    roots: list[str] = []
    for path in dict.fromkeys(path for state in states for path in state):  # a parent comes before its children
        inside = path[:-1] in differ
        if inside or len({state.get(path) for state in states}) > 1:
            differ.add(path)
            if not inside:
                roots.append(name(path))
    return tuple(roots)


def refill(state: dict[Any, Any], tree: Tree, tensors: Sequence[Tensor]) -> None:
    """Make `state` the tree, in place, with `tensors[i]` where slot `i` stands; extra keys are removed.

    Dicts and lists that are there are kept and refilled, plain values of the same bits are left as they are. A dict or
    list that stands in several places of `state` is kept in the first; the others get one of their own.
    """
    _Refill(tensors).value(tree.root, state)


def name(path: Path) -> str:
    """A path as people write it: `optimizer/state/0/exp_avg`."""
    return "/".join(map(str, path))


def _pack(value: object, path: Path, tensors: list[Tensor]) -> object:
    """The packed form of a node, as msgspec takes it; its tensors are appended in canonical order."""
    if len(path) > MAX_DEPTH:
        raise UsageError(f"the state is nested deeper than {MAX_DEPTH} at {name(path)!r}; does something hold itself?")
    if value is None or type(value) in (bool, float, bytes):
        return value
    if type(value) is int:
        return value if value in _WORD else ["i", value.to_bytes(_width(value), "little", signed=True)]
    if type(value) is str:
        return _checked_text(value, path)
    if isinstance(value, Tensor):
        if why := rawbytes.unfit(value):
            raise UsageError(f"the tensor at {name(path)!r} {why}")
        tensors.append(value)
        return ["x", rawbytes.NAMES[value.dtype], *value.shape]
    if isinstance(value, dict):
        items = ((_pack(key, path, tensors), _pack(value[key], (*path, key), tensors)) for key in _keys(value, path))
        return ["d", *(part for item in items for part in item)]
    if type(value) is list or type(value) is tuple:
        tag = "l" if type(value) is list else "t"
        return [tag, *(_pack(item, (*path, index), tensors) for index, item in enumerate(value))]
    raise UsageError(
        f"the state holds a {type(value).__module__}.{type(value).__qualname__} at {name(path)!r}; it may hold dicts, "
        f"lists, tuples, tensors, int, float, bool, str, bytes and None, of exactly these types: convert it"
    )


def _keys(value: dict[Any, Any], path: Path) -> list[str | int]:
    """The keys of a dict in canonical order."""
    for key in value:
        if type(key) not in (str, int):
            raise UsageError(f"the dict at {name(path)!r} has the key {key!r}; keys must be str or int")
    return sorted(value, key=_rank_of)


def _rank_of(key: str | int) -> tuple[bool, str | int]:
    """What dict keys are sorted by."""
    return (isinstance(key, str), key)


def _checked_text(text: str, path: Path) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the str {text!r} at {name(path)!r} is not valid Unicode; use bytes") from None
    return text


def _width(value: int) -> int:
    """Fewest bytes that hold an int in two's complement."""
    return (value if value >= 0 else ~value).bit_length() // 8 + 1


def _unpack(packed: object, path: Path, slots: list[Slot], paths: list[Path]) -> Node:
    """The node of a packed form, checked; slots and their paths are appended in canonical order."""
    if len(path) > MAX_DEPTH:
        raise ProtocolError(f"a skeleton is nested deeper than {MAX_DEPTH}")
    if packed is None or type(packed) in (bool, int, float, bytes, str):
        return packed
    match packed:
        case ["i", bytes(data)]:
            return _unpack_int(data)
        case ["l", *items]:
            return [_unpack(item, (*path, index), slots, paths) for index, item in enumerate(items)]
        case ["t", *items]:
            return tuple(_unpack(item, (*path, index), slots, paths) for index, item in enumerate(items))
        case ["d", *items] if len(items) % 2 == 0:
            return _unpack_dict(items, path, slots, paths)
        case ["x", str(dtype), *sizes]:
            slots.append(_unpack_slot(len(slots), dtype, sizes, path))
            paths.append(path)
            return slots[-1]
    raise ProtocolError(f"a skeleton has an unknown kind of node at {name(path)!r}")


def _unpack_dict(items: list[object], path: Path, slots: list[Slot], paths: list[Path]) -> dict[str | int, Node]:
    node: dict[str | int, Node] = {}
    last: tuple[bool, str | int] | None = None
    for packed_key, packed_value in zip(items[::2], items[1::2], strict=True):
        key = _unpack(packed_key, (), [], [])
        if type(key) is not str and type(key) is not int:
            raise ProtocolError(f"a skeleton has a dict at {name(path)!r} with a key that is neither str nor int")
        if last is not None and _rank_of(key) <= last:
            raise ProtocolError(f"a skeleton has a dict at {name(path)!r} whose keys are not in order")
        last = _rank_of(key)
        node[key] = _unpack(packed_value, (*path, key), slots, paths)
    return node


def _unpack_int(data: bytes) -> int:
    value = int.from_bytes(data, "little", signed=True)
    if value in _WORD or len(data) != _width(value):
        raise ProtocolError(f"a skeleton has an int of {len(data)} bytes that is not in its shortest form")
    return value


def _unpack_slot(index: int, dtype: str, sizes: list[object], path: Path) -> Slot:
    shape = tuple(size for size in sizes if type(size) is int and 0 <= size <= MAX_TENSOR)
    if dtype not in rawbytes.DTYPES or len(shape) != len(sizes) or len(shape) > MAX_DEPTH:
        raise ProtocolError(f"a skeleton has a tensor at {name(path)!r} of unknown dtype or impossible shape")
    # empty dimensions are left out of the product: torch computes strides from the others
    if math.prod(size or 1 for size in shape) * rawbytes.DTYPES[dtype].itemsize > MAX_TENSOR:
        raise ProtocolError(f"a skeleton has a tensor at {name(path)!r} of over {MAX_TENSOR} bytes")
    return Slot(index, dtype, shape)


def _tokens(node: Node, path: Path, leaf_digests: Sequence[bytes]) -> Iterator[tuple[Path, bytes]]:
    if isinstance(node, Slot):
        yield path, msgspec.msgpack.encode(["x", node.dtype, node.shape, leaf_digests[node.index]])
    elif isinstance(node, dict):
        yield path, msgspec.msgpack.encode(["d"])
        for key, value in node.items():
            yield from _tokens(value, (*path, key), leaf_digests)
    elif isinstance(node, (list, tuple)):
        yield path, msgspec.msgpack.encode(["l" if isinstance(node, list) else "t"])
        for index, value in enumerate(node):
            yield from _tokens(value, (*path, index), leaf_digests)
    else:
        yield path, msgspec.msgpack.encode(_pack(node, path, []))


class _Refill:
    """One run of `refill`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._kept: set[int] = set()

    def value(self, node: Node, old: Any) -> Any:
        """What is to stand where `old` stood: `old` itself where it can be made to equal the node."""
        if isinstance(node, Slot):
            return self._tensors[node.index]
        if isinstance(node, dict):
            return self._dict(node, old if isinstance(old, dict) and self._keep(old) else {})
        if isinstance(node, list):
            return self._list(node, old if isinstance(old, list) and self._keep(old) else [])
        if isinstance(node, tuple):
            before = old if isinstance(old, tuple) else ()
            after = self._items(node, before)
            same = len(after) == len(before) and all(new is one for new, one in zip(after, before, strict=True))
            return before if same and isinstance(old, tuple) else tuple(after)
        return old if _same_bits(node, old) else node

    def _keep(self, container: object) -> bool:
        """Whether this is the container's first place."""
        first = id(container) not in self._kept
        self._kept.add(id(container))
        return first

    def _dict(self, node: dict[str | int, Node], old: dict[Any, Any]) -> dict[Any, Any]:
        for key in [key for key in old if key not in node]:
            del old[key]
        for key, child in node.items():
            before = old.get(key, _NOTHING)
            after = self.value(child, before)
            if after is not before:
                old[key] = after
        return old

    def _list(self, node: list[Node], old: list[Any]) -> list[Any]:
        old[:] = self._items(node, old)
        return old

    def _items(self, node: Sequence[Node], old: Sequence[Any]) -> list[Any]:
        return [self.value(child, old[i] if i < len(old) else _NOTHING) for i, child in enumerate(node)]


def _same_bits(one: object, other: object) -> bool:
    """Whether two plain values are equal to the bit; NaNs and zeros of one sign are, ints and floats never."""
    if type(one) is float and type(other) is float:
        return struct.pack("<d", one) == struct.pack("<d", other)
    return type(one) is type(other) and one == other
