"""Reads a step of a Ringhold store as a source, in the standard form of a training state.

    {"model": {NAME: tensor}, "optimizer": {"state": {NAME: {"exp_avg": tensor, ..., "fp32": master}},
     "param_groups": [{"params": [NAME, ...], "lr": ...}]}, "scheduler": ..., "rng": ..., ...}

A model's tensor without a master is `fp32` if it is one of 32 bits that the optimizer steps, else `param`; `frozen` and
`param` states of names are told in the step's metadata by whoever converted it. Any other nest of tensors is read too:
each is a `param` under its path. Found by `checkpoint.formats.detect`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.language import Spec
from checkpoint.nest import parts_of
from checkpoint.reader import Reader
from checkpoint.source import FP32, PARAM, Bytes, Entry, Group
from collectives.errors import UsageError
from collectives.region import Region

STATES = "conversion.states"
"""Key of the metadata that gives the state of the model's tensors: {NAME: "param", ...}."""


def is_folder(folder: Path) -> bool:
    """Whether a folder is a store with a step."""
    from checkpoint.store import is_store

    return is_store(folder)


def read(folder: str | Path, spec: Spec | None = None) -> "Stored":
    """Open a step: path or URL of the store, `@STEP` behind it for another than the newest."""
    return Stored(Reader(folder))


class Stored:
    """A source over a step of a store."""

    def __init__(self, reader: Reader) -> None:
        self.format = "ringhold"
        self._reader = reader
        self._keys: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._values: dict[str, Any] = reader.state() if isinstance(reader.state(), dict) else {}
        optimizer = self._values.get("optimizer")
        rows = optimizer.get("param_groups", ()) if isinstance(optimizer, dict) else ()
        self._groups = [_group(row) for row in rows if isinstance(row, Mapping)]
        stepped = {name for group in self._groups for name in group.names}
        given: Mapping[str, str] = reader.manifest.metadata.get(STATES) or {}
        for key, tensor in reader.tensors.items():
            name, state = _place(parts_of(key), stepped, given, tensor.dtype)
            entry = Entry(name, state, tensor.dtype, tuple(tensor.shape))
            self._entries[entry.key], self._keys[entry.key] = entry, key

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Tensors by key."""
        return self._entries

    @property
    def groups(self) -> Sequence[Group]:
        """Parameter groups."""
        return self._groups

    @property
    def extras(self) -> Mapping[str, Any]:
        """All of the state but the model and the optimizer."""
        found = {
            name: value
            for name, value in self._values.items()
            if name not in ("model", "optimizer") and not _has_tensor(value, self._reader.tensors)
        }
        return {"iteration": self._reader.manifest.step, **found}

    def read(self, key: str, box: Region) -> Bytes:
        """Return the bytes of a box of a tensor, verified (`Source.read`)."""
        if key not in self._keys:
            raise UsageError(f"this checkpoint has no tensor {key!r}")
        return self._reader.read(self._keys[key], box)

    def close(self) -> None:
        """Close the store."""
        self._reader.close()


def _place(path: tuple[str, ...], stepped: set[str], given: Mapping[str, str], dtype: str) -> tuple[str, str]:
    """Name and state of a tensor at a path of the state."""
    match path:
        case ("optimizer", "state", *parts, state) if parts:
            return "/".join(parts), state
        case ("model", *parts) if parts:
            name = "/".join(parts)
            return name, given.get(name, FP32 if name in stepped and dtype in ("F32", "F64") else PARAM)
    return "/".join(path), PARAM


def _group(row: Mapping[str, Any]) -> Group:
    options = {key: value for key, value in row.items() if key != "params"}
    return Group(tuple(map(str, row.get("params", ()))), options)


def _has_tensor(value: Any, keys: Mapping[str, Any]) -> bool:
    if isinstance(value, dict):
        return any(_has_tensor(item, keys) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_tensor(item, keys) for item in value)
    return isinstance(value, str) and value in keys
