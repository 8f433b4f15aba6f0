"""Writes a source as a step of a Ringhold store, in the standard form of a training state (see `read_ringhold`).

The step's number is the source's `iteration`; a step of a store is copied as it is. The store may be there already; it
then gets one more step, which shares chunks with the others. Called by `convert`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint.convert import Progress, WriteOptions
from checkpoint.formats.read_ringhold import STATES, Stored
from checkpoint.nest import key_of
from checkpoint.source import FP32, FROZEN, PARAM, Bytes, Entry, Source, states_by_name
from checkpoint.writer import Writer
from collectives.errors import UsageError
from collectives.region import Region

_THREADS = 2


def write(source: Source, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write a step.

    Raises:
        UsageError: the store has a step of this number.
        StorageFailed: it cannot be written.

    """
    if isinstance(source, Stored):
        _copy(source, options, progress)
        return
    step = source.extras.get("iteration", 0)
    url = options.destination or os.fspath(folder)
    with Writer(url, step if isinstance(step, int) else 0, threads=_THREADS) as writer:
        _check_new(writer, url, step)
        state: dict[str, Any] = {"model": {}, "optimizer": {"state": {}, "param_groups": []}}
        given: dict[str, str] = {}
        for name, states in states_by_name(source).items():
            # The model holds what the job runs with: the 16-bit parameter where there is one beside its master.
            weight = next((s for s in (PARAM, FP32, FROZEN) if s in states), None)
            for kind, entry in states.items():
                path = ("model", name) if kind == weight else ("optimizer", "state", name, kind)
                if kind == weight:
                    state["model"][name] = {"$tensor": key_of(path)}
                    given[name] = kind
                else:
                    state["optimizer"]["state"].setdefault(name, {})[kind] = {"$tensor": key_of(path)}
                writer.add(key_of(path), entry.dtype, entry.shape, _reading(source, entry, progress))
        rows = [{"params": list(group.names), **group.options} for group in source.groups]
        state["optimizer"]["param_groups"] = [_plain(row) for row in rows]
        state |= {key: _plain(value) for key, value in source.extras.items() if key not in state}
        options.proven()
        writer.finish(state, {STATES: given})


def _copy(source: Stored, options: WriteOptions, progress: Progress) -> None:
    """Write a step of another store under its own number: the same state to the bit, with layouts and metadata."""
    manifest = source.reader.manifest
    with Writer(options.destination, manifest.step, threads=_THREADS) as writer:
        _check_new(writer, options.destination, manifest.step)
        for key, tensor in manifest.tensors.items():
            writer.add(key, tensor.dtype, tensor.shape, _told(source, key, progress), manifest.layout(key))
        writer.finish(manifest.state, manifest.metadata)


def _told(source: Stored, key: str, progress: Progress) -> Callable[[Region], Bytes]:
    def read(box: Region) -> Bytes:
        data = source.reader.read(key, box)
        progress(data.nbytes)
        return data

    return read


def _check_new(writer: Writer, url: str, step: Any) -> None:
    if step in writer.store.steps():
        raise UsageError(f"{url} has a step {step} already; convert to another store, or remove the step")


def _reading(source: Source, entry: Entry, progress: Progress) -> Callable[[Region], Bytes]:
    def read(box: Region) -> Bytes:
        data = source.read(entry.key, box)
        progress(data.nbytes)
        return data

    return read


def _plain(value: Any) -> Any:
    """A JSON value as a state's nest writes it: what it has marks for is marked."""
    from checkpoint.nest import take_apart

    return take_apart(value, lambda _: False)[0]
