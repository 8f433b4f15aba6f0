"""The flat pieces of DeepSpeed's ZeRO optimizers, put back into parameters. Used by `read_deepspeed`.

ZeRO-1 and 2 keep the address of each parameter in each rank's piece of its group; with ZeRO-3 every parameter is cut
evenly over all ranks, padded, and addresses follow from the order. Formats: `stage_1_and_2.py`, `stage3.py` and
`bf16_optimizer.py` of DeepSpeed 0.19.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.formats.deepspeed_states import Shard, options_of, shape_of, states_of, tensor_of
from checkpoint.lazy import Flat, PiecesMissing, Stored, scalar
from checkpoint.source import FP32, STEP
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import Opaque
from collectives.errors import CorruptFile

EXPERT_NAME = re.compile(r"(.*deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")


class Zero12:
    """ZeRO-1 and 2 (and the bf16 optimizer): each rank has a flat piece of each group, with addresses by name."""

    def __init__(self, shard: Shard, files: Sequence[TorchFile], shapes: Sequence[Mapping[str, Any]]) -> None:
        self.shard, self.files, self.shapes = shard, files, shapes

    def read(self) -> None:
        """Put the parameters, groups and options of all ranks into the shard."""
        states = [file.value["optimizer_state_dict"] for file in self.files]
        mappings = [state.get("param_slice_mappings") for state in states]
        if any(mapping is None for mapping in mappings):
            raise CorruptFile(
                f"{self.files[0].file.path}: it has no param_slice_mappings; it was written by a DeepSpeed before "
                f"0.7.3, which kept no addresses of parameters: load and save it with a newer one"
            )
        base = states[0].get("base_optimizer_state")
        options = base.get("param_groups", []) if isinstance(base, dict) else []
        for group in range(len(states[0]["single_partition_of_fp32_groups"])):
            option = options[group] if group < len(options) else {}
            flats = [_flat_states(file, group) for file in self.files]
            expert = bool(option.get("moe")) or self._count(states[0], group) < len(self.files)
            names = self._group(group, flats, [mapping[group] for mapping in mappings], expert, states[0])
            self.shard.options.append(options_of(option, self.files[0]))
            self.shard.groups.append(names)

    def _count(self, state: Mapping[str, Any], group: int) -> int:
        counts = state.get("partition_count")
        return int(counts[group]) if isinstance(counts, list) and group < len(counts) else len(self.files)

    def _group(
        self,
        group: int,
        flats: Sequence[Mapping[str, Stored | float]],
        mappings: Sequence[Mapping[str, Any]],
        expert: bool,
        state: Mapping[str, Any],
    ) -> list[str]:
        count = self._count(state, group)
        members = expert_ranks(mappings, count) if expert else [list(range(len(self.files)))]
        local = max((int(m[2]) + 1 for name in self.shapes[group] if (m := EXPERT_NAME.fullmatch(name))), default=0)
        names: list[str] = []
        for index, ranks in enumerate(members):
            for name, shape in self.shapes[group].items():
                whole = _global_expert(name, index * local)
                names.append(whole)
                self.shard.shapes[whole] = shape_of(shape)
                self._param(name, whole, [(flats[r], mappings[r]) for r in ranks])
        return names

    def _param(
        self, name: str, whole: str, ranks: Sequence[tuple[Mapping[str, Stored | float], Mapping[str, Any]]]
    ) -> None:
        holders = [(flat, mapping[name]) for flat, mapping in ranks if name in mapping]
        for key in dict.fromkeys(key for flat, _ in holders for key in flat):
            runs, at = [], 0
            for flat, address in holders:
                start, numel = _address(address, name)
                value = flat.get(key)
                if isinstance(value, Stored):
                    runs.append((at, value.flat(start, start + numel)))
                elif value is not None:
                    self.shard.put(whole, key, scalar(value))
                at += numel
            if runs:
                self.shard.put(whole, key, Flat(f"{whole}|{key}", self.shard.shapes[whole], runs))


def expert_ranks(mappings: Sequence[Mapping[str, Any]], count: int) -> list[list[int]]:
    """For each expert parallel rank, the data parallel ranks that share its experts, in order of their partitions.

    Ranks with the same addresses hold the same partition of different experts. Where partitions look alike, expert
    parallel ranks follow each other, as DeepSpeed arranges them by default.
    """
    world = len(mappings)
    parallel = world // max(count, 1)
    classes: dict[tuple[Any, ...], list[int]] = {}
    for rank, mapping in enumerate(mappings):
        classes.setdefault(tuple((n, *_address(a, n)) for n, a in sorted(mapping.items())), []).append(rank)
    if len(classes) != count or any(len(ranks) != parallel for ranks in classes.values()):
        return [list(range(index, world, parallel)) for index in range(parallel)]
    return [sorted(ranks[index] for ranks in classes.values()) for index in range(parallel)]


class Zero3:
    """ZeRO-3: every parameter is cut over all ranks, padded to a multiple; sub-groups of them are flat on each rank."""

    def __init__(
        self, where: str, shard: Shard, files: Sequence[TorchFile], shapes: Sequence[Mapping[str, Any]]
    ) -> None:
        self.where, self.shard, self.files, self.shapes = where, shard, files, shapes

    def read(self) -> None:
        """Put the parameters, groups and options of all ranks into the shard."""
        first = self.files[0].value["optimizer_state_dict"]
        if first.get("ds_zero_partition_groups"):
            raise PiecesMissing(
                f"{self.where}: experts are partitioned by themselves (AutoEP with ZeRO-3), which is not "
                f"supported; convert with DeepSpeed's ds_to_universal and read the universal folder"
            )
        flats = [[_zero3_states(file, index) for index in range(len(self.shapes))] for file in self.files]
        for index, row in enumerate(self.shapes):
            offset = 0
            for name, shape in row.items():
                offset += self._param(name, shape_of(shape), [flat[index] for flat in flats], offset)
        options = first.get("optimizer_state_dict", {}).get("param_groups", [])
        for option in options:
            rows = [index for index in option.get("params", ()) if index < len(self.shapes)]
            self.shard.options.append(options_of(option, self.files[0]))
            self.shard.groups.append([name for index in rows for name in self.shapes[index]])

    def _param(
        self, name: str, shape: tuple[int, ...], flats: Sequence[Mapping[str, Stored | float]], offset: int
    ) -> int:
        numel, world = math.prod(shape), len(self.files)
        each = -(-numel // world)
        for key in flats[0]:
            runs = []
            for rank, flat in enumerate(flats):
                value = flat.get(key)
                length = max(0, min(each, numel - rank * each))
                if isinstance(value, Stored):
                    runs.append((rank * each, value.flat(offset, offset + length)))
            first = flats[0][key]
            if runs:
                self.shard.put(name, key, Flat(f"{name}|{key}", shape, runs))
            elif isinstance(first, float):
                self.shard.put(name, key, scalar(first))
        return each


def _flat_states(file: TorchFile, group: int) -> dict[str, Stored | float]:
    """The flat tensors of a group on one rank, and its step."""
    state = file.value["optimizer_state_dict"]
    found: dict[str, Stored | float] = {FP32: tensor_of(file, state["single_partition_of_fp32_groups"][group], FP32)}
    base = state.get("base_optimizer_state")
    if isinstance(base, dict):
        options = base.get("param_groups") or [{}] * (group + 1)
        found |= states_of(file, (base.get("state") or {}).get(group), options[group])
    elif isinstance(base, list) and group < len(base):
        found |= states_of(file, base[group], {STEP: state.get("base_optimizer_state_step")})
    return found


def _zero3_states(file: TorchFile, index: int) -> dict[str, Stored | float]:
    state = file.value["optimizer_state_dict"]
    flats = state["fp32_flat_groups"]
    if index >= len(flats):
        raise CorruptFile(f"{file.file.path}: it has {len(flats)} flat groups, and the model states name more")
    found: dict[str, Stored | float] = {FP32: tensor_of(file, flats[index], FP32)}
    inner = state.get("optimizer_state_dict") or {}
    group: Mapping[str, Any] = next((g for g in inner.get("param_groups", ()) if index in g.get("params", ())), {})
    return found | states_of(file, (inner.get("state") or {}).get(index), group)


def _address(address: Any, name: str) -> tuple[int, int]:
    """Start and number of elements of a fragment."""
    get = address.get if isinstance(address, Opaque | dict) else lambda _key: None
    start, numel = get("start"), get("numel")
    if type(start) is not int or type(numel) is not int or start < 0 or numel < 0:
        raise CorruptFile(f"{name}: its address in the flat group is malformed")
    return start, numel


def _global_expert(name: str, first: int) -> str:
    """The name of an expert's parameter with the number that the expert has in the whole model."""
    match = EXPERT_NAME.fullmatch(name)
    return f"{match[1]}{int(match[2]) + first}{match[3]}" if match else name
