"""Writes a universal checkpoint folder of DeepSpeed, without torch or DeepSpeed, for a job with `load_universal`.

Tensors are whole, for a job of any parallelism, so that there is nothing to choose by a layout.

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.convert import WriteOptions
from checkpoint.formats.output import Output, at_once
from checkpoint.formats.universal_info import Merging, written_info
from checkpoint.pickling import Call, Name, ordered
from checkpoint.source import FP32, FROZEN, PARAM, STEP, WEIGHTS, Source, states_by_name, weight_key
from checkpoint.torch_file import Saved, saved, scalar
from collectives.errors import UsageError

_VERSION = "0.19.8"


@dataclass(frozen=True, slots=True)
class _File:
    """A file to write, and what is in it."""

    path: str
    value: Any


def write(source: Source, folder: Path, options: WriteOptions, progress: Callable[[int], None]) -> None:
    """Write all of a source into an empty folder.

    Raises:
        UsageError: there is no state of an optimizer, or a name cannot be a folder.

    """
    if all(entry.state in WEIGHTS for entry in source.entries.values()):
        raise UsageError(
            "a universal checkpoint of DeepSpeed is for going on with training, and the source has no state of an "
            "optimizer; convert to hf or dcp, and load these weights before deepspeed.initialize"
        )
    step = int(source.extras.get("iteration") or 0)
    tag = f"global_step{step}"
    files = [_File(f"{tag}/zero/{file.path}", file.value) for file in _atoms(source, progress)]
    # Stages 1 and 2 look for the first name, stage 3 for the second, which need not hold 16-bit parameters once more.
    files.append(_File(f"{tag}/mp_rank_00_model_states.pt", _model_states(source, step, progress, True)))
    files.append(_File(f"{tag}/zero_pp_rank_0_mp_rank_00_model_states.pt", _model_states(source, step, _silent, False)))
    files.append(_File(f"{tag}/zero/optimizer_state.pt", _optimizer_state(source)))
    for parent in {(folder / file.path).parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)
    output = Output(folder, options.journal, progress)
    for _ in at_once(lambda file: output.write(file.path, [file.value], Path(file.path).stem), files):
        pass
    (folder / "latest_universal").write_text(tag)


def _atoms(source: Source, progress: Callable[[int], None]) -> Iterator[_File]:
    """The files of every parameter that an optimizer steps, and of those that are frozen, by their path in `zero`."""
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
            yield _File(f"{name}/{state}.pt", value)


def _stepped(source: Source) -> set[str]:
    """Names of the parameters that the optimizer has; where nothing is known of one, all that have a weight in fp32."""
    if source.groups:
        return {name for group in source.groups for name in group.names}
    return {entry.name for entry in source.entries.values() if entry.state == FP32 or entry.dtype in ("BF16", "F16")}


def _silent(_nbytes: int) -> None:
    return


def _model_states(source: Source, step: int, progress: Callable[[int], None], parameters: bool) -> dict[str, Any]:
    """What `mp_rank_00_model_states.pt` holds; `parameters`: with those that the optimizer has as masters too."""
    shapes = {entry.name: entry.shape for entry in source.entries.values() if entry.state in WEIGHTS}
    masters = {entry.name: entry.dtype for entry in source.entries.values() if entry.state == FP32}
    stepped = _stepped(source)
    kept = [
        entry
        for entry in source.entries.values()
        if (entry.name not in stepped and entry.state in WEIGHTS)
        or (parameters and entry.state == PARAM and entry.dtype != masters.get(entry.name))
    ]
    frozen = {entry.name: entry for entry in kept if entry.state == FROZEN}
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
        "skipped_steps": int(extras.get("skipped_steps") or 0),
        "global_steps": step,
        "global_samples": int(extras.get("global_samples") or 0),
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
    return saved(source, entry, _silent)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (shape,))
