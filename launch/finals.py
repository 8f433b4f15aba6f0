"""The result of a training job on disk, whole or not there at all, and good to start from again.

`final.safetensors` holds every tensor of the state under its path (`model/tokens`) and, as metadata, all the
rest as JSON and the hash of the whole; `final.json` holds the same JSON for people. Written by `launch.job`'s first
rank, read for `--resume`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from collectives.errors import CorruptFile
from collectives.state import state_hash
from launch.trainer import State

FINAL = "final.safetensors"
SUMMARY = "final.json"
_KEY = "ringhold"


@dataclass(frozen=True, slots=True)
class Final:
    """A state that was read from a file."""

    state: State
    hash: str
    details: dict[str, Any]
    """What was stored besides: config, loss..."""


def exists(out: Path) -> bool:
    """Tell whether the folder holds the result of a job."""
    return (out / FINAL).exists()


def save(out: Path, state: State, details: dict[str, Any]) -> str:
    """Write `final.json`, then `final.safetensors`, each by a rename, into folder `out`; return the state's hash.

    `details` are JSON values to keep with the state. Calling it again replaces both files.
    """
    tensors: dict[str, Tensor] = {}
    digest = state_hash(state)
    plain = _take_apart(state, "", tensors)
    text = json.dumps({"hash": digest, "state": plain, **details}, indent=2)
    _publish(out / SUMMARY, lambda path: path.write_text(text + "\n"))
    _publish(out / FINAL, lambda path: save_file(tensors, path, metadata={_KEY: text}))
    return digest


def load(path: Path) -> Final:
    """Read a `final.safetensors` and prove its content by its hash.

    Raises:
        CorruptFile: it is not whole, not a file of this kind, or its content is not what was written.

    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read as safetensors ({error}); take another file") from None
    if _KEY not in metadata:
        raise CorruptFile(f"{path} holds tensors but no training state; resume from a {FINAL} of a training job")
    try:
        details = json.loads(metadata[_KEY])
        digest, state = details.pop("hash"), details.pop("state")
        for name, tensor in tensors.items():
            _put(state, name.split("/"), tensor)
        found = state_hash(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"the metadata of {path} is malformed ({error}); take another file") from None
    if found != digest:
        raise CorruptFile(f"{path} was altered: its state hashes to {found}, not {digest}; take another file")
    return Final(state, digest, details)


def _take_apart(node: State, prefix: str, tensors: dict[str, Tensor]) -> State:
    """Return the nest without its tensors, which are put into `tensors` by path."""
    plain: State = {}
    for key, value in node.items():
        if isinstance(value, dict):
            plain[key] = _take_apart(value, f"{prefix}{key}/", tensors)
        elif isinstance(value, torch.Tensor):
            tensors[prefix + key] = value
        else:
            plain[key] = value
    return plain


def _put(state: State, path: list[str], tensor: Tensor) -> None:
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = tensor


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, and rename it: never half a file under this name."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
