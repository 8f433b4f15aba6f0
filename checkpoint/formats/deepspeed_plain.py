"""DeepSpeed's optimizers without ZeRO: torch's own, and those of 16-bit parameters. Used by `read_deepspeed`.

Their states have numbers instead of names, group by group; `matching` finds the names. Formats: `engine.py`,
`fp16/fused_optimizer.py` and `fp16/unfused_optimizer.py` of DeepSpeed 0.19.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.formats.deepspeed_states import Shard, options_of, put_state, tensor_of
from checkpoint.formats.matching import assign
from checkpoint.language import Spec
from checkpoint.lazy import Flat, Lazy, PiecesMissing, Stored
from checkpoint.source import FP32, FROZEN, PARAM
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import TensorRef


def plain_optimizer(shard: Shard, model: TorchFile, where: str, aliases: dict[str, str], spec: Spec) -> None:
    """Without ZeRO: the state of torch's optimizer by number, or of the 16-bit optimizer, flat for each group."""
    saved = model.value["optimizer"]
    flat = saved.get("fp32_groups_flat") if isinstance(saved, dict) else None
    inner = saved.get("optimizer_state_dict", saved)
    shapes, seen = {}, set()
    for name, states in shard.states.items():
        stored = states.get(PARAM)
        if not isinstance(stored, Stored) or name in (model.value.get("buffer_names") or ()):
            continue
        place = (stored.file.path, stored.offset, stored.shape)
        if place not in seen:
            shapes[name] = stored.shape
        seen.add(place)
    groups = inner["param_groups"]
    if flat is not None:
        _flat_groups(shard, model, flat, inner, shapes, where)
        _settle(shard, shapes, set(shapes), aliases)
        return
    masters = _masters(saved, groups)
    slots = [[_slot_shape(inner["state"].get(index), masters.get(index)) for index in g["params"]] for g in groups]
    stepping = {name: shape for name, shape in shapes.items() if not spec.frozen(name)}
    named = assign(stepping, slots, [group.get("param_names") for group in groups], where)
    stepped = set()
    for group, names in zip(groups, named, strict=True):
        for index, name in zip(group["params"], names, strict=True):
            if index in masters:
                put_state(shard, name, FP32, masters[index], model)
            else:
                shard.put(name, FP32, shard.states[name].pop(PARAM))
            for key, value in (inner["state"].get(index) or {}).items():
                put_state(shard, name, key, value, model)
            stepped.add(name)
        shard.options.append(options_of(group, model))
        shard.groups.append(list(names))
    _settle(shard, shapes, stepped, aliases)


def _flat_groups(
    shard: Shard, model: TorchFile, flat: Any, inner: Any, shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """The fp16 optimizer: a group's parameters one behind the other in one flat master, in the order of the group."""
    totals = [tensor_of(model, ref, "fp32_groups_flat").size for ref in flat]
    if len(flat) != 1 or totals[0] != sum(map(math.prod, shapes.values())):
        raise PiecesMissing(
            f"{where}: the 16-bit optimizer without ZeRO keeps {len(flat)} groups without names of their parameters, "
            f"which cannot be told apart; save it with ZeRO stage 1"
        )
    master = tensor_of(model, flat[0], "fp32_groups_flat")
    state = inner["state"].get(0) or {}
    at = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        for key, ref in {FP32: flat[0], **state}.items():
            if isinstance(ref, TensorRef) and math.prod(ref.shape) == master.size:
                shard.put(name, key, Flat(name, shape, [(0, tensor_of(model, ref, key).flat(at, at + count))]))
            else:
                put_state(shard, name, key, ref, model)
        at += count
    shard.options.append(options_of(inner["param_groups"][0], model))
    shard.groups.append(list(shapes))


def _settle(shard: Shard, shapes: Mapping[str, tuple[int, ...]], stepped: set[str], aliases: dict[str, str]) -> None:
    """Name frozen those that no optimizer steps, and take out further names of one tensor, told in `aliases`."""
    owners = {}
    for name in shapes:
        states = shard.states[name]
        if (stored := states.get(PARAM) or states.get(FP32)) is not None:
            owners[_place(stored)] = name
        if name not in stepped:
            shard.put(name, FROZEN, states.pop(PARAM))
    for name, states in list(shard.states.items()):
        if name not in shapes and (owner := owners.get(_place(states.get(PARAM)))):
            aliases[name] = owner
            del shard.states[name]


def _place(tensor: Lazy | None) -> tuple[Path, int, tuple[int, ...]] | None:
    """What two names of one tensor have in common."""
    return (tensor.file.path, tensor.offset, tensor.shape) if isinstance(tensor, Stored) else None


def _masters(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """The fp32 masters that an optimizer of 16-bit parameters keeps one by one, by number."""
    rows = saved.get("fp32_groups") or ()
    pairs = [(group["params"], row) for group, row in zip(groups, rows, strict=False)]
    return {index: ref for numbers, row in pairs for index, ref in zip(numbers, row, strict=False)}


def _slot_shape(state: Any, master: Any = None) -> tuple[int, ...] | None:
    """The shape of a numbered parameter, by its master or moments; None if it has none."""
    if isinstance(master, TensorRef):
        return master.shape
    tensors = [ref.shape for ref in (state or {}).values() if isinstance(ref, TensorRef) and ref.shape]
    return tensors[0] if tensors else None
