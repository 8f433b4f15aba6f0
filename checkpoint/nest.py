"""A nested state without its tensors, as JSON, and back. For writers and readers of checkpoints; needs no torch.

A state is a dict of dicts, lists, tuples, tensors and plain values. Each tensor gets a key: the path to it, with "/"
between, "%" and "/" inside a part written as "%25" and "%2F". What JSON has no word for is an object of one member:

    {"$tensor": KEY}     {"$tuple": [...]}     {"$bytes": BASE64}     {"$float": "nan" | "inf" | "-inf"}
    {"$int": DECIMAL}    an int beyond 64 bits
    {"$dict": [[KEY, VALUE], ...]}    a dict with a key that is no str, or that starts with "$"

Nothing else is kept: whatever a state holds besides is refused by name when it is saved.
"""

import base64
import binascii
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from collectives.errors import CorruptFile, UsageError

Json: TypeAlias = Any
Path: TypeAlias = tuple[str | int, ...]

MAX_DEPTH = 64
_WORD = range(-(1 << 63), 1 << 63)


def key_of(path: Path) -> str:
    """The key of the tensor at a path."""
    return "/".join(str(part).replace("%", "%25").replace("/", "%2F") for part in path)


def parts_of(key: str) -> tuple[str, ...]:
    """The path of a key; ints come back as strings."""
    return tuple(part.replace("%2F", "/").replace("%25", "%") for part in key.split("/"))


def take_apart(state: Any, is_tensor: Callable[[Any], bool]) -> tuple[Json, dict[str, Any]]:
    """The nest as JSON, and its tensors by key, in the order of the nest.

    Raises:
        UsageError: something in it cannot be kept, two tensors have one key, or it is nested deeper than `MAX_DEPTH`.

    """
    tensors: dict[str, Any] = {}
    return _pack(state, (), is_tensor, tensors), tensors


def put_together(nest: Json, tensor: Callable[[str], Any]) -> Any:
    """The state again, with `tensor(key)` where a tensor stood.

    Raises:
        CorruptFile: `take_apart` cannot have made this.

    """
    return _unpack(nest, tensor, 0)


def tensor_keys(nest: Json) -> list[str]:
    """The keys of the tensors, in order. Raises `CorruptFile` as `put_together` does."""
    found: list[str] = []
    put_together(nest, found.append)
    return found


def dict_of(items: dict[str | int, Json]) -> Json:
    """The JSON of a dict whose values are JSON already."""
    if all(isinstance(key, str) and not key.startswith("$") for key in items):
        return items
    return {"$dict": [list(item) for item in items.items()]}


def items_of(node: Json) -> dict[str | int, Json] | None:
    """The items of a node that is a dict; None if it is none. Only for what `take_apart` made."""
    if not isinstance(node, dict):
        return None
    if len(node) == 1 and (tag := next(iter(node))).startswith("$"):
        return dict(node[tag]) if tag == "$dict" else None
    return node


def join(prefix: str, part: str | int) -> str:
    """The key of what lies in another."""
    return f"{prefix}/{key_of((part,))}" if prefix else key_of((part,))


def _pack(value: Any, path: Path, is_tensor: Callable[[Any], bool], tensors: dict[str, Any]) -> Json:
    if len(path) > MAX_DEPTH:
        raise UsageError(
            f"the state is nested deeper than {MAX_DEPTH} at {key_of(path)!r}; does something hold itself?"
        )
    if is_tensor(value):
        key = key_of(path)
        if key in tensors:
            raise UsageError(f"two tensors of the state have the key {key!r} (0 and '0' in one dict?); rename one")
        tensors[key] = value
        return {"$tensor": key}
    if isinstance(value, dict):
        return dict_of({_key(key, path): _pack(item, (*path, key), is_tensor, tensors) for key, item in value.items()})
    if type(value) in (list, tuple):
        listed = [_pack(item, (*path, index), is_tensor, tensors) for index, item in enumerate(value)]
        return listed if type(value) is list else {"$tuple": listed}
    return _plain(value, path)


def _key(key: Any, path: Path) -> str | int:
    if type(key) not in (str, int):
        raise UsageError(f"the dict at {key_of(path)!r} has the key {key!r}; keys must be str or int")
    return _text(key, path) if isinstance(key, str) else key


def _plain(value: Any, path: Path) -> Json:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _text(value, path)
    if kind is int:
        return value if value in _WORD else {"$int": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    raise UsageError(
        f"the state holds a {kind.__module__}.{kind.__qualname__} at {key_of(path)!r}; it may hold dicts, lists, "
        f"tuples, tensors, int, float, bool, str, bytes and None, of exactly these types: convert it"
    )


def _text(text: str, path: Path) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the str {text!r} at {key_of(path)!r} is not valid Unicode; use bytes") from None
    return text


def _unpack(node: Json, tensor: Callable[[str], Any], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise CorruptFile(f"the state of a checkpoint is nested deeper than {MAX_DEPTH}")
    if isinstance(node, list):
        return [_unpack(item, tensor, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1 and (tag := next(iter(node))).startswith("$"):
        return _tagged(tag, node[tag], tensor, depth)
    if any(key.startswith("$") for key in node):
        raise CorruptFile(f"the state of a checkpoint has a node of unknown kind: {sorted(node)[:3]}")
    return {key: _unpack(item, tensor, depth + 1) for key, item in node.items()}


def _tagged(tag: str, content: Json, tensor: Callable[[str], Any], depth: int) -> Any:
    try:
        if tag == "$tensor" and isinstance(content, str):
            return tensor(content)
        if tag == "$tuple" and isinstance(content, list):
            return tuple(_unpack(item, tensor, depth + 1) for item in content)
        if tag == "$bytes":
            return base64.b64decode(content, validate=True)
        if tag == "$float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if tag == "$int" and isinstance(content, str) and len(content) < 4000:
            return int(content)
        if tag == "$dict" and isinstance(content, list):
            return dict(_items(content, tensor, depth))
    except (ValueError, TypeError, binascii.Error):
        pass
    raise CorruptFile(f"the state of a checkpoint has a malformed node {tag}")


def _items(pairs: list[Any], tensor: Callable[[str], Any], depth: int) -> Iterator[tuple[str | int, Any]]:
    for key, value in pairs:
        if type(key) not in (str, int):
            raise TypeError(key)
        yield key, _unpack(value, tensor, depth + 1)
