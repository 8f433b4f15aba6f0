"""A source put together by a reader: entries whose tensors are lazy, groups and extras. Every reader returns one."""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.files import Files
from checkpoint.lazy import Lazy
from checkpoint.source import Bytes, Entry, Group
from collectives.errors import UsageError
from collectives.region import Region


class Gathered:
    """A `Source` of lazy tensors; readers `add` them in the order of the model."""

    def __init__(self, form: str, files: Files) -> None:
        self.format = form
        self.entries: dict[str, Entry] = {}
        self.groups: Sequence[Group] = ()
        self.extras: dict[str, Any] = {}
        self.files = files
        self._tensors: dict[str, Lazy] = {}

    def add(self, name: str, state: str, tensor: Lazy) -> None:
        """Take a tensor; one of a key that is there already replaces it."""
        entry = Entry(name, state, tensor.dtype, tensor.shape)
        self.entries[entry.key] = entry
        self._tensors[entry.key] = tensor

    def tensor(self, key: str) -> Lazy:
        """Return a tensor. `UsageError`: there is none of that key."""
        if key not in self._tensors:
            raise UsageError(f"this checkpoint has no tensor {key!r}")
        return self._tensors[key]

    def read(self, key: str, box: Region) -> Bytes:
        """Return the bytes of a box of a tensor (`Source.read`)."""
        tensor = self.tensor(key)
        if not Region.whole(tensor.shape).contains(box):
            raise UsageError(f"{key}: {box.start} to {box.stop} does not lie within shape {tensor.shape}")
        return tensor.read(box)

    def close(self) -> None:
        """Close every file."""
        self.files.close()


def tied(aliases: Mapping[str, str]) -> list[list[str]]:
    """Return lists of names that share a tensor, the owner first, from alias -> owner."""
    found: dict[str, list[str]] = {}
    for alias, owner in aliases.items():
        found.setdefault(owner, [owner]).append(alias)
    return list(found.values())
