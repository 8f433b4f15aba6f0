"""Checkpoints as DeepSpeed lays them out, made with torch alone: any sizes, groups, ranks and shards.

`made(folder, ...)` writes one and returns the truth. DeepSpeed's classes are stood in for by modules that exist while
the files are pickled.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Model:
    """What is saved: parameters whole, by name; groups of names with options; frozen ones; buffers; aliases."""

    params: Mapping[str, tuple[int, ...]]
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]]
    frozen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    seed: int = 5

    def states(self) -> dict[str, Tensors]:
        """Random masters and moments: by state, then name."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            state: {name: torch.randn(shape, generator=generator) for name, shape in self.params.items()}
            for state in ("fp32", "exp_avg", "exp_avg_sq")
        }


@contextmanager
def deepspeed_classes() -> Iterator[Any]:
    """`fragment_address`, importable under DeepSpeed's name while the context lasts."""
    names = ("deepspeed", "deepspeed.utils", "deepspeed.utils.tensor_fragment")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = ModuleType(name)

    class fragment_address:
        def __init__(self, numel: int, start: int) -> None:
            self.numel, self.start = numel, start

    fragment_address.__module__ = names[-1]
    fragment_address.__qualname__ = "fragment_address"
    sys.modules[names[-1]].fragment_address = fragment_address  # type: ignore[attr-defined]
    try:
        yield fragment_address
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def zero12(folder: Path, model: Model, dp: int, *, dtype: torch.dtype = torch.float32, step: float = 7.0) -> Tensors:
    """Write a ZeRO-1 checkpoint of `dp` ranks and return the truth by `NAME|STATE`."""
    states = model.states()
    tag = _start(folder)
    per_rank = write_zero12(tag, model, states, dp, mp=0, step=step)
    assert per_rank == dp
    torch.save(_model_states(model, states["fp32"], dtype, dp), tag / "mp_rank_00_model_states.pt")
    return truth(model, states)


def write_zero12(tag: Path, model: Model, states: dict[str, Tensors], dp: int, mp: int, step: float) -> int:
    """Write the optimizer files of one model parallel rank."""
    flats, mappings = [], []
    for names, _ in model.groups:
        rows = {state: torch.cat([states[state][name].reshape(-1) for name in names]) for state in states}
        total = -(-rows["fp32"].numel() // (2 * dp)) * 2 * dp
        rows = {state: torch.cat([row, torch.full((total - row.numel(),), 2.9e29)]) for state, row in rows.items()}
        flats.append({state: row.chunk(dp) for state, row in rows.items()})
        mappings.append(_addresses(names, states["fp32"], total // dp, dp))
    with deepspeed_classes() as address:
        for rank in range(dp):
            state: dict[str, Any] = {
                "base_optimizer_state": {
                    "state": {
                        g: {
                            "step": torch.tensor(step),
                            "exp_avg": flats[g]["exp_avg"][rank].clone(),
                            "exp_avg_sq": flats[g]["exp_avg_sq"][rank].clone(),
                        }
                        for g in range(len(flats))
                    },
                    "param_groups": [{**options, "params": [g]} for g, (_, options) in enumerate(model.groups)],
                },
                "single_partition_of_fp32_groups": [flats[g]["fp32"][rank].clone() for g in range(len(flats))],
                "partition_count": [dp] * len(flats),
                "zero_stage": 1,
                "param_slice_mappings": [
                    {name: address(numel, start) for name, (start, numel) in mapping[rank].items()}
                    for mapping in mappings
                ],
            }
            name = f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": state, "ds_version": "made"}, tag / name)
    return dp


def _addresses(names: Sequence[str], whole: Tensors, each: int, dp: int) -> list[dict[str, tuple[int, int]]]:
    """For each rank, start and number of elements of each name in the rank's piece."""
    found: list[dict[str, tuple[int, int]]] = [{} for _ in range(dp)]
    at = 0
    for name in names:
        end = at + whole[name].numel()
        for rank in range(dp):
            low, high = max(at, rank * each), min(end, (rank + 1) * each)
            if low < high:
                found[rank][name] = (low - rank * each, high - low)
        at = end
    return found


def zero3(folder: Path, model: Model, dp: int, *, step: float = 7.0) -> Tensors:
    """Write a ZeRO-3 checkpoint of `dp` ranks, padded with garbage, and return the truth."""
    states = model.states()
    frozen = {name: torch.randn(shape) for name, shape in model.frozen.items()}
    tag = _start(folder)
    for rank in range(dp):
        flats = [
            {state: torch.cat([_shard(states[state][name], rank, dp) for name in names]) for state in states}
            for names, _ in model.groups
        ]
        optimizer = {
            "zero_stage": 3,
            "partition_count": dp,
            "fp32_flat_groups": [flat["fp32"] for flat in flats],
            "optimizer_state_dict": {
                "state": {
                    g: {"step": torch.tensor(step), "exp_avg": flat["exp_avg"], "exp_avg_sq": flat["exp_avg_sq"]}
                    for g, flat in enumerate(flats)
                },
                "param_groups": [{**options, "params": [g]} for g, (_, options) in enumerate(model.groups)],
            },
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, tag / f"{name}_optim_states.pt")
        value = _model_states(model, {name: torch.empty(0) for name in model.params}, torch.float32, dp)
        value["frozen_param_shapes"] = {n: torch.Size(s) for n, s in model.frozen.items()}
        value["frozen_param_fragments"] = {n: _shard(t, rank, dp) for n, t in frozen.items()}
        torch.save(value, tag / f"{name}_model_states.pt")
    return truth(model, states) | {f"{name}|frozen": tensor for name, tensor in frozen.items()}


def _shard(tensor: torch.Tensor, rank: int, dp: int) -> torch.Tensor:
    each = -(-tensor.numel() // dp)
    piece = tensor.reshape(-1)[rank * each : (rank + 1) * each]
    return torch.cat([piece, torch.full((each - piece.numel(),), 2.9e29)])


def _start(folder: Path) -> Path:
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    return tag


def _model_states(model: Model, params: Tensors, dtype: torch.dtype, dp: int) -> dict[str, Any]:
    module = {name: tensor.to(dtype) for name, tensor in params.items()} | dict(model.buffers)
    module |= {alias: module[owner] for alias, owner in model.aliases.items()}
    return {
        "module": module,
        "buffer_names": list(model.buffers),
        "param_shapes": [{name: torch.Size(model.params[name]) for name in names} for names, _ in model.groups],
        "shared_params": dict(model.aliases),
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "dp_world_size": dp,
        "global_steps": 7,
        "optimizer": None,
    }


def truth(model: Model, states: dict[str, Tensors]) -> Tensors:
    """Every tensor whole by `NAME|STATE`."""
    return {f"{name}|{state}": tensor for state, row in states.items() for name, tensor in row.items()}


def large(mebibytes: float) -> Model:
    """A model of transformer layers whose fp32 masters and moments have about so many MiB."""
    wanted, width = mebibytes * 2**20 / 12, 512
    layer = {
        "attention.qkv.weight": (3 * width, width),
        "attention.proj.weight": (width, width),
        "mlp.up.weight": (4 * width, width),
        "mlp.down.weight": (width, 4 * width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    count = max(1, round(wanted / sum(map(math.prod, layer.values()))))
    params = {f"layers.{index}.{name}": shape for index in range(count) for name, shape in layer.items()}
    matrices = [name for name, shape in params.items() if len(shape) > 1]
    vectors = [name for name, shape in params.items() if len(shape) == 1]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [(matrices, {**options, "weight_decay": 0.1}), (vectors, {**options, "weight_decay": 0.0})]
    return Model(params, groups)
