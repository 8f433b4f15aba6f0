"""Writes a universal checkpoint folder of DeepSpeed, without torch or DeepSpeed, for a job with `load_universal`.

One folder serves every stage of ZeRO: tensors are atoms of stages 1 and 2 (dicts with `param`), which stage 3 reads
too, and the model states are there under the names that both look for. What DeepSpeed's own `ds_to_universal` loses is
kept:

- Every group's hyperparameters. Stages 1 and 2 take them group by group. Stage 3 applies one group's values to all
  groups, so what it is given are those alone in which all groups agree; a job keeps its own for the rest.
- Frozen parameters and buffers, in the model states and as atoms. DeepSpeed does not load these from universal folders;
  a job can, from `module` of the model states.

Called by `checkpoint.convert`. Source: `deepspeed/checkpoint/{constants,ds_to_universal,universal_checkpoint}.py` and
the optimizers' `_load_universal_checkpoint` of DeepSpeed 0.19.8.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import torch_file
from checkpoint.convert import WriteOptions
from checkpoint.formats.universal_info import Merging, written_info
from checkpoint.pickling import Call, Name, ordered
from checkpoint.source import FP32, FROZEN, PARAM, STEP, WEIGHTS, Source, states_by_name, weight_key
from checkpoint.torch_file import Saved, saved, scalar
from collectives.errors import UsageError

_VERSION = "0.19.8"
_THREADS = 4


@dataclass(frozen=True, slots=True)
class _File:
    """A file to write, and what is in it."""

    path: Path
    value: Any


def write(source: Source, folder: Path, options: WriteOptions, progress: Callable[[int], None]) -> None:
    """Write all of a source into an empty folder.

    Raises:
        UsageError: a layout is given; or a name cannot be a folder.

    """
    if options.layout:
        raise UsageError(
            "a universal checkpoint of DeepSpeed holds whole tensors for a job of any parallelism; leave --layout out"
        )
    step = int(source.extras.get("iteration") or 0)
    tag = f"global_step{step}"
    zero = folder / tag / "zero"
    files = list(_atoms(source, zero, progress))
    for path in {file.path.parent for file in files} | {zero}:
        path.mkdir(parents=True, exist_ok=True)
    states = _model_states(source, step, progress)
    files.append(_File(folder / tag / "mp_rank_00_model_states.pt", states))
    files.append(_File(zero / "optimizer_state.pt", _optimizer_state(source)))
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(_write, sorted(files, key=lambda file: file.path)):
            pass
    # The name that ZeRO-3 looks for.
    (folder / tag / "zero_pp_rank_0_mp_rank_00_model_states.pt").hardlink_to(files[-2].path)
    (folder / "latest_universal").write_text(tag)


def _write(file: _File) -> None:
    out = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        torch_file.write(out, file.value, file.path.stem)
    finally:
        os.close(out)


def _atoms(source: Source, zero: Path, progress: Callable[[int], None]) -> Iterator[_File]:
    """The files of every parameter that an optimizer steps, and of those that are frozen."""
    merging = Merging(source.extras.get("universal_checkpoint_info") or {})
    stepped = _stepped(source)
    for name, states in states_by_name(source).items():
        if name not in stepped and FROZEN not in states:
            continue
        if name in (".", "..") or "/" in name or "\0" in name:
            raise UsageError(f"parameter {name!r} cannot be the name of a folder, which a universal checkpoint needs")
        weight = weight_key(source, name)
        atoms = {FP32: source.entries[weight]} if weight else {}
        atoms |= {state: entry for state, entry in states.items() if state not in WEIGHTS}
        for state, entry in atoms.items():
            tensor = saved(source, entry, progress)
            value = tensor if state == STEP else {**merging.of(name, entry.shape), "param": tensor}
            yield _File(zero / name / f"{state}.pt", value)


def _stepped(source: Source) -> set[str]:
    """Names of the parameters that the optimizer has; where nothing is known of one, all that have a weight in fp32."""
    if source.groups:
        return {name for group in source.groups for name in group.names}
    return {entry.name for entry in source.entries.values() if entry.state == FP32 or entry.dtype in ("BF16", "F16")}


def _model_states(source: Source, step: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """What `mp_rank_00_model_states.pt` holds."""
    shapes = {entry.name: entry.shape for entry in source.entries.values() if entry.state in WEIGHTS}
    kept = [entry for entry in source.entries.values() if entry.state in (PARAM, FROZEN)]
    frozen = {entry.name: entry for entry in kept if entry.state == FROZEN}
    stepped = _stepped(source)
    names = [list(group.names) for group in source.groups] or [sorted(stepped)]
    extras = source.extras
    return {
        **(extras.get("client_state") or {}),
        "module": ordered({entry.name: saved(source, entry, progress) for entry in kept}),
        "buffer_names": [entry.name for entry in kept if entry.name not in stepped and entry.name not in frozen],
        "optimizer": None,
        "param_shapes": [ordered({name: _size(shapes[name]) for name in group if name in shapes}) for group in names],
        "frozen_param_shapes": ordered({name: _size(entry.shape) for name, entry in frozen.items()}),
        "shared_params": {other: owner for owner, *others in extras.get("tied", ()) for other in others},
        "frozen_param_fragments": None,
        "lr_scheduler": extras.get("scheduler"),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {},
        "ds_version": _VERSION,
        "iteration": step,
        "universal_checkpoint_info": written_info(extras.get("universal_checkpoint_info") or {}),
    }


def _optimizer_state(source: Source) -> dict[str, Any]:
    """What `zero/optimizer_state.pt` holds: `param_groups` for stages 1 and 2, `optimizer_state_dict` for stage 3."""
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.options.items()} | {"params": [number]}
        for number, group in enumerate(source.groups)
    ]
    agreed = (
        {key: value for key, value in groups[0].items() if all(one.get(key) == value for one in groups)}
        if groups
        else {}
    )
    return {
        "dynamic_loss_scale": False,
        "overflow": False,
        "ds_version": _VERSION,
        "partition_count": [1] * len(groups),
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {0: {"step": _step(source)}},
            "param_groups": [agreed | {"params": [0]}],
        },
    }


def _step(source: Source) -> Saved:
    """The optimizer's step: that of any parameter, as stage 3 has it; else the iteration."""
    entry = next((entry for entry in source.entries.values() if entry.state == STEP), None)
    if entry is None:
        return scalar(float(source.extras.get("iteration") or 0))
    return saved(source, entry, lambda _: None)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (shape,))
