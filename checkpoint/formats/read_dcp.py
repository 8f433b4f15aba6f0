"""Reads folders of torch.distributed.checkpoint: FSDP2, FSDP with tensor parallelism, any state that torch saved so.

Tensors under `model` are those of the model; under `optim` (or `optimizer`) is what `get_optimizer_state_dict` gives:
nested (`state.NAME.exp_avg`, `param_groups.0.lr`) or flattened (`state.NAME.exp_avg`, `param_groups.NAME.lr`), where
groups are found again as parameters with the same options. A state dict of a model alone has no prefix. The rest is
extras. Found by `checkpoint.formats.detect`.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.dtypes import FLOATS, itemsize
from checkpoint.files import Files
from checkpoint.formats.dcp_metadata import METADATA, Metadata
from checkpoint.formats.gathered import Gathered
from checkpoint.language import Spec, cleaned
from checkpoint.lazy import Lazy, number
from checkpoint.source import FP32, PARAM, Entry, Group, blocks

_STATE, _GROUPS = "state", "param_groups"
_INLINE = 1 << 16
"""Bytes of a tensor outside of model and optimizer that becomes an extra; larger ones are left out and named."""
_STATES = frozenset({"exp_avg", "exp_avg_sq", "step", "momentum_buffer", "square_avg", "sum", "max_exp_avg_sq"})

LIFTED = ("iteration", "scheduler", "rng", "client_state")
"""What our own writer puts under `extra`."""


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return (folder / METADATA).is_file()


def read(folder: Path, spec: Spec | None = None) -> Gathered:
    """Open a folder. Tensors are whole already, so `spec` has only names to add.

    Raises:
        CorruptFile, UnknownPickle, PiecesMissing, Unreadable: it cannot be read whole.

    """
    files = Files()
    try:
        return _Reader(folder, files).gather()
    except BaseException:
        files.close()
        raise


class _Reader:
    def __init__(self, folder: Path, files: Files) -> None:
        self.metadata = Metadata(folder, files)
        self.spec = Spec.built_in("dcp")
        self.source = Gathered("dcp", files)
        self.optim = _optimizer_prefix([*self.metadata.tensors, *self.metadata.objects])
        self.model = _model_prefix(self.metadata, self.optim)

    def _model_name(self, key: str) -> str | None:
        """The name of a tensor of the model; None for another one."""
        if self.model is not None:
            prefix = self.model + "."
            return cleaned(self.spec, key.removeprefix(prefix)) if key.startswith(prefix) else None
        return None if self.optim is not None and key.startswith(self.optim + ".") else cleaned(self.spec, key)

    def gather(self) -> Gathered:
        """Put everything together."""
        model = {key: name for key in self.metadata.tensors if (name := self._model_name(key)) is not None}
        floats = {self.metadata.tensors[key].dtype for key in model} & FLOATS
        state = FP32 if floats <= {"F32", "F64"} else PARAM
        moments = self._moments(set(model.values()))
        for key, name in model.items():
            self.source.add(name, state, self.metadata.tensor(key))
            for moment, tensor in moments.pop(name, {}).items():
                self.source.add(name, moment, tensor)
        for name, states in moments.items():
            for moment, tensor in states.items():
                self.source.add(name, moment, tensor)
        self.source.groups = self._groups(list(dict.fromkeys(model.values())))
        self._extras(model)
        return self.source

    def _moments(self, names: set[str]) -> dict[str, dict[str, Lazy]]:
        """States of the optimizer by parameter: the key ends in the state, what is between is the name."""
        found: dict[str, dict[str, Lazy]] = {}
        prefix = f"{self.optim}.{_STATE}."
        for key in self.metadata.tensors:
            if self.optim is not None and key.startswith(prefix):
                name, _, state = key.removeprefix(prefix).rpartition(".")
                found.setdefault(cleaned(self.spec, name), {})[state] = self.metadata.tensor(key)
        return found

    def _groups(self, names: list[str]) -> list[Group]:
        if self.optim is None:
            return []
        prefix = f"{self.optim}.{_GROUPS}."
        rows: dict[str, dict[str, Any]] = {}
        for key in self.metadata.objects:
            if key.startswith(prefix):
                owner, _, option = key.removeprefix(prefix).rpartition(".")
                rows.setdefault(owner, {})[option] = self._value(key)
        for key in self.metadata.tensors:  # a learning rate may be a tensor
            if key.startswith(prefix):
                owner, _, option = key.removeprefix(prefix).rpartition(".")
                rows.setdefault(owner, {})[option] = number(self.metadata.tensor(key))
        if rows and all(owner.isdecimal() and "params" in row for owner, row in rows.items()):
            ordered = [row for _, row in sorted(rows.items(), key=lambda item: int(item[0]))]
            return [Group(tuple(cleaned(self.spec, str(n)) for n in row.pop("params")), row) for row in ordered]
        self.source.extras["flattened"] = bool(rows)
        return _regrouped({cleaned(self.spec, owner): row for owner, row in rows.items()}, names)

    def _value(self, key: str) -> Any:
        value, file = self.metadata.object(key)
        found, left_out = file.json(value, key)
        self.source.extras.setdefault("left_out", []).extend(left_out)
        return found

    def _path(self, key: str) -> tuple[Any, ...]:
        return self.metadata.paths.get(key) or tuple(key.split("."))

    def _extras(self, model: dict[str, str]) -> None:
        """Everything that is neither model nor optimizer, as nested values."""
        for key in self.metadata.objects:
            if self.optim is not None and key.startswith(self.optim + "."):
                continue
            _put(self.source.extras, self._path(key), self._value(key))
        for key, whole in self.metadata.tensors.items():
            if key in model or (self.optim is not None and key.startswith(self.optim + ".")):
                continue
            tensor = self.metadata.tensor(key)
            if tensor.size * itemsize(whole.dtype) > _INLINE:
                self.source.extras.setdefault("left_out", []).append(key)
                continue
            data = base64.b64encode(tensor.whole().tobytes()).decode()
            value = {"dtype": whole.dtype, "shape": list(whole.shape), "base64": data}
            _put(self.source.extras, self._path(key), value)
        extra = self.source.extras.get("extra")
        if isinstance(extra, dict):
            for ours, theirs in (*((key, key) for key in LIFTED), ("iteration", "step"), ("scheduler", "lr_sched")):
                if theirs in extra:
                    self.source.extras.setdefault(ours, extra[theirs])
        self.source.extras["tied"] = _tied(self.metadata, model, self.source)
        if not self.source.extras.get("left_out"):
            self.source.extras.pop("left_out", None)


def _optimizer_prefix(keys: Sequence[str]) -> str | None:
    """What is before `.state.` and `.param_groups.` in the keys of the optimizer."""
    for key in keys:
        before, found, after = key.partition(".state.")
        if found and after.rpartition(".")[2] in _STATES:
            return before
    return next((key.partition(".param_groups.")[0] for key in keys if ".param_groups." in key), None)


def _model_prefix(metadata: Metadata, optim: str | None) -> str | None:
    """What is before the names in the keys of the model: of a parameter that the optimizer knows, else "model"."""
    keys = list(metadata.tensors)
    others = [key for key in keys if optim is None or not key.startswith(optim + ".")]
    if optim is not None:
        first = f"{optim}.{_STATE}."
        names = {key.removeprefix(first).rpartition(".")[0] for key in keys if key.startswith(first)}
        for key in others:
            if key in names:
                return None
            before, _, name = key.partition(".")
            while name:
                if name in names:
                    return before
                part, _, name = name.partition(".")
                before = f"{before}.{part}"
    nested = [key for key in others if metadata.paths.get(key, (key,))[0] == "model"]
    return "model" if nested or (others and all(key.startswith("model.") for key in others)) else None


def _regrouped(rows: dict[str, dict[str, Any]], names: list[str]) -> list[Group]:
    """Groups of a flattened state: parameters with the same options, in the order of the model."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name in (*(name for name in names if name in rows), *(name for name in rows if name not in set(names))):
        options = {key: value for key, value in rows[name].items() if key != "params"}
        found.setdefault(repr(sorted(options.items())), ([], options))[0].append(name)
    return [Group(tuple(members), options) for members, options in found.values()]


def _put(nest: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        inner = nest.setdefault(str(part), {})
        if not isinstance(inner, dict):
            return
        nest = inner
    nest[str(path[-1])] = value


def _tied(metadata: Metadata, model: dict[str, str], source: Gathered) -> list[list[str]]:
    """Names of one tensor: of one place in the files, or a copy of which the optimizer knows only the other."""
    places: dict[Any, list[str]] = {}
    for key, name in model.items():
        places.setdefault(tuple(chunk.item for chunk in metadata.tensors[key].chunks), []).append(name)
    found = [names for items, names in places.items() if items and len(names) > 1]
    stepped = {name for group in source.groups for name in group.names}
    entries = {entry.name: entry for entry in source.entries.values() if entry.state in (FP32, PARAM)}
    for name, entry in entries.items():
        if stepped and name not in stepped and entry.dtype in FLOATS:
            twins = [
                other
                for other in (entries[n] for n in entries if n in stepped)
                if (other.dtype, other.shape) == (entry.dtype, entry.shape) and _equal(source, entry, other)
            ]
            found += [[twin.name, name] for twin in twins[:1]]
    return found


def _equal(source: Gathered, a: Entry, b: Entry) -> bool:
    """Whether two tensors of one shape hold the same bytes; stops at the first difference."""
    return all(bool((source.read(a.key, box) == source.read(b.key, box)).all()) for box in blocks(a, 1 << 20))
