"""Bad stores of every kind, made by hand: each takes a good store apart and changes what a reader has to notice.

An attack changes the decoded manifest (a dict), which is then sealed again with a right digest: what is tested is not
the digest but what is believed after it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collectives.hashing import digest

Body = dict[str, Any]
Attack = Callable[[Body], None]


def manifest_of(store: Path) -> Path:
    """The file of the only step."""
    (found,) = (store / "steps").glob("*.json")
    return found


def body_of(store: Path) -> Body:
    """What the manifest says."""
    text = manifest_of(store).read_bytes()
    body: Body = json.loads(text)["body"]
    return body


def seal(store: Path, body: bytes, schema: int = 1, name: str = "ringhold checkpoint") -> None:
    """Write a manifest with a right digest."""
    head = f'{{"format": "{name}", "schema": {schema}, "blake3": "{digest(body).hex()}", "body":\n'
    manifest_of(store).write_bytes(head.encode() + body + b"}\n")


def forge(store: Path, attack: Attack) -> None:
    """Change what the manifest says."""
    body = body_of(store)
    attack(body)
    seal(store, json.dumps(body).encode())


def _set(*path: Any, to: Any) -> Attack:
    def attack(body: Body) -> None:
        node: Any = body
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to

    return attack


def _drop(*path: Any) -> Attack:
    def attack(body: Body) -> None:
        node: Any = body
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]

    return attack


def _nest(body: Body) -> None:
    node: Any = {}
    for _ in range(300):
        node = [node]
    body["state"]["deep"] = node


MANIFESTS: dict[str, Attack] = {
    "a pack outside the store": _set("packs", 0, to="../../outside.pack"),
    "an absolute pack": _set("packs", 0, to="/etc/passwd.pack"),
    "a pack with a slash": _set("packs", 0, to="a/b.pack"),
    "a pack that is hidden": _set("packs", 0, to=".pack"),
    "a pack with a NUL": _set("packs", 0, to="a\x00.pack"),
    "a pack with a newline": _set("packs", 0, to="a.pack\n"),
    "a pack that is a number": _set("packs", 0, to=3),
    "no such pack": _set("chunks", 0, 2, to=99),
    "a negative pack": _set("chunks", 0, 2, to=-1),
    "a negative offset": _set("chunks", 0, 3, to=-8),
    "a huge offset": _set("chunks", 0, 3, to=1 << 63),
    "a chunk of no bytes": _set("chunks", 0, 4, to=0),
    "a chunk that is stored longer than it is": _set("chunks", 0, 4, to=1 << 20),
    "a huge chunk": _set("chunks", 0, 1, to=1 << 40),
    "a chunk of another size": _set("chunks", 0, 1, to=12),
    "a digest in capitals": _set("chunks", 0, 0, to="AB" * 32),
    "a short digest": _set("chunks", 0, 0, to="ab"),
    "a chunk with a field more": lambda body: body["chunks"][0].append(1),
    "no such chunk": _set("tensors", "w", "chunks", 0, to=10**6),
    "a negative chunk": _set("tensors", "w", "chunks", 0, to=-1),
    "a chunk too few": lambda body: body["tensors"]["w"]["chunks"].pop(),
    "a chunk too many": lambda body: body["tensors"]["w"]["chunks"].append(0),
    "an unknown dtype": _set("tensors", "w", "dtype", to="F7"),
    "another dtype": _set("tensors", "w", "dtype", to="F64"),
    "a negative extent": _set("tensors", "w", "shape", to=[-300, -200]),
    "an extent that is a float": _set("tensors", "w", "shape", to=[300.5, 200]),
    "a huge shape of empty extents": _set("tensors", "w", "shape", to=[1 << 60, 0]),
    "too many dimensions": _set("tensors", "w", "shape", to=[1] * 100),
    "another shape": _set("tensors", "w", "shape", to=[200, 300]),
    "a grid of other dimensions": _set("tensors", "w", "grid", to=[[1, 1]]),
    "a grid of no parts": _set("tensors", "w", "grid", to=[[0, 1], [1, 1]]),
    "a grid of more parts than there are": _set("tensors", "w", "grid", to=[[1 << 40, 1], [1, 1]]),
    "a layout that is none": _set("layouts", 0, to={"mesh": 3}),
    "no such layout": _set("tensors", "w", "layout", to=5),
    "a tensor less": _drop("tensors", "w"),
    "a tensor that the state does not name": _drop("state", "w"),
    "a tensor that is named twice": _set("state", "again", to={"$tensor": "w"}),
    "an unknown tag": _set("state", "x", to={"$pickle": "gASVCAAAAAAAAACMBHN5c3Q="}),
    "a tag beside a key": _set("state", "x", to={"$tuple": [], "more": 1}),
    "bytes that are no base64": _set("state", "x", to={"$bytes": "***"}),
    "bytes that are a number": _set("state", "x", to={"$bytes": 3}),
    "a float that is a word": _set("state", "x", to={"$float": "many"}),
    "an int that is a word": _set("state", "x", to={"$int": "many"}),
    "an int of a million digits": _set("state", "x", to={"$int": "9" * 10**6}),
    "a dict with a list as key": _set("state", "x", to={"$dict": [[[1], 2]]}),
    "a dict that is flat": _set("state", "x", to={"$dict": [1, 2]}),
    "a state that is deep": _nest,
    "a negative step": _set("step", to=-1),
    "a step that is a word": _set("step", to="one"),
    "no chunks": _drop("chunks"),
    "no state": _drop("state"),
}
"""What a manifest may wrongly say."""
