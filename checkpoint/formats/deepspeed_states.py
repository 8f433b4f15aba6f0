"""Pieces of DeepSpeed's files that its readers share: shapes, tensors, numbers, states and options of groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.lazy import Lazy, Stored, number, scalar
from checkpoint.source import STEP
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import TensorRef
from collectives.errors import CorruptFile


@dataclass
class Shard:
    """What one model parallel rank holds of the parameters: by name, in order; shapes are its own."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    states: dict[str, dict[str, Lazy]] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    def put(self, name: str, state: str, tensor: Lazy) -> None:
        """Take a tensor; one that is there already is replaced."""
        self.states.setdefault(name, {})[state] = tensor


def states_of(file: TorchFile, state: Any, option: Mapping[str, Any]) -> dict[str, Stored | float]:
    """Return what an optimizer keeps under one number: flat tensors, and numbers; the step may be the group's."""
    found: dict[str, Stored | float] = {}
    for key, value in (state or {}).items():
        if isinstance(value, TensorRef) and value.shape:
            found[str(key)] = tensor_of(file, value, str(key))
        elif isinstance(value, TensorRef):
            found[str(key)] = number(file.stored(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[str(key)] = float(value)
    if STEP not in found and found and (step := option.get(STEP)) is not None:
        found[STEP] = number(file.stored(step)) if isinstance(step, TensorRef) else float(step)
    return found


def put_state(shard: Shard, name: str, key: str, value: Any, file: TorchFile) -> None:
    """Take a state that is a tensor or a number; leave others out."""
    if isinstance(value, TensorRef):
        shard.put(name, key, tensor_of(file, value, name))
    elif isinstance(value, int | float):
        shard.put(name, key, scalar(value))


def options_of(option: Mapping[str, Any], file: TorchFile) -> dict[str, Any]:
    """A group's hyperparameters as JSON."""
    kept = {key: value for key, value in option.items() if key not in ("params", "param_names", STEP)}
    found, _ = file.json(kept, "param_groups")
    return dict(found)


def tensor_of(file: TorchFile, ref: Any, name: str) -> Stored:
    """Return the elements of a tensor. `CorruptFile`: it is none."""
    if not isinstance(ref, TensorRef):
        raise CorruptFile(f"{file.file.path}: {name} is no tensor")
    return file.stored(ref)


def shape_rows(shapes: Any) -> list[dict[str, Any]]:
    """`param_shapes`: a list of one dict for each group."""
    rows = shapes if isinstance(shapes, list) else [shapes] if shapes else []
    return [dict(row) for row in rows]


def shape_of(shape: Any) -> tuple[int, ...]:
    """Return a shape. `CorruptFile`: it is none."""
    if not isinstance(shape, tuple | list) or any(type(n) is not int or n < 0 for n in shape):
        raise CorruptFile(f"a checkpoint gives {shape!r} for a shape")
    return tuple(shape)
