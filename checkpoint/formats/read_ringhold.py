"""Reads a step of a Ringhold store as a source, in the standard form of a training state.

    {"model": {NAME: tensor}, "optimizer": {"state": {NAME: {"exp_avg": tensor, ..., "fp32": master}},
     "param_groups": [{"params": [NAME, ...], "lr": ...}]}, "scheduler": ..., "rng": ..., ...}

A model's tensor without a master is `fp32` if it is one of 32 bits that the optimizer steps, else `param`; `frozen` and
`param` states of names are told in the step's metadata by whoever converted it. Tensors elsewhere (random states) are
extras if they are small, else left out and named. Of a state without a model each tensor is a `param` under its path.
Found by `checkpoint.formats.detect`.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.language import Spec
from checkpoint.nest import parts_of
from checkpoint.reader import Reader
from checkpoint.source import FP32, PARAM, Bytes, Entry, Group
from checkpoint.unpickle import to_json
from collectives.errors import UsageError
from collectives.region import Region

STATES = "conversion.states"
"""Key of the metadata that gives the state of the model's tensors: {NAME: "param", ...}."""
_INLINE = 1 << 16
"""Bytes of a tensor outside of model and optimizer that becomes an extra."""


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
        self.reader = reader
        self._left_out: list[str] = []
        self._keys: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._paths = {key: parts_of(key) for key in reader.tensors}
        self._modelled = modelled = any(path[0] == "model" and len(path) > 1 for path in self._paths.values())
        elsewhere = {key for key, path in self._paths.items() if modelled and path[0] not in ("model", "optimizer")}
        values = reader.state(lambda key: self._inline(key) if key in elsewhere else None)
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}
        optimizer = self._values.get("optimizer")
        rows = optimizer.get("param_groups", ()) if isinstance(optimizer, dict) else ()
        self._groups = [_group(row) for row in rows if isinstance(row, Mapping)]
        stepped = {name for group in self._groups for name in group.names}
        given: Mapping[str, str] = reader.manifest.metadata.get(STATES) or {}
        for key, tensor in reader.tensors.items():
            if key in elsewhere:
                continue
            name, state = _place(self._paths[key], stepped, given, tensor.dtype)
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
        """All of the state but the model and the optimizer; small tensors of it as JSON."""
        rest = {name: value for name, value in self._values.items() if name not in ("model", "optimizer")}
        found, _ = to_json(rest)
        extras = {"iteration": self.reader.manifest.step, **found} if self._modelled else {}
        return {**extras, "left_out": self._left_out} if self._left_out else extras

    def _inline(self, key: str) -> Any:
        """A small tensor as JSON; None for a large one, which is left out."""
        tensor = self.reader.tensors[key]
        if tensor.nbytes > _INLINE:
            self._left_out.append(key)
            return None
        data = base64.b64encode(self.reader.read(key).tobytes()).decode()
        return {"dtype": tensor.dtype, "shape": list(tensor.shape), "base64": data}

    def read(self, key: str, box: Region) -> Bytes:
        """Return the bytes of a box of a tensor, verified (`Source.read`)."""
        if key not in self._keys:
            raise UsageError(f"this checkpoint has no tensor {key!r}")
        return self.reader.read(self._keys[key], box)

    def close(self) -> None:
        """Close the store."""
        self.reader.close()


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
    options, _ = to_json({key: value for key, value in row.items() if key != "params"})
    return Group(tuple(map(str, row.get("params", ()))), options)
