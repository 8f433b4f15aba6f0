"""Reads DeepSpeed's own checkpoints: ZeRO 0 to 3, tensor and pipeline parallel, mixture of experts, frozen parameters.

A folder has `mp_rank_XX_model_states.pt` for each model parallel rank (with ZeRO-3 `zero_pp_rank_DD_mp_rank_XX_...` for
every rank), `layer_NN...-model_states.pt` for each layer of a PipelineModule, `layer_L_expert_E_...` for each expert,
and `[bf16_]zero_pp_rank_DD_mp_rank_XX_optim_states.pt` for each rank. Formats read from DeepSpeed 0.19's `engine.py`,
`stage_1_and_2.py`, `stage3.py`. Found by `checkpoint.formats.detect`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.files import Files, Unreadable
from checkpoint.formats.deepspeed_tp import by_affine_map, spec_of
from checkpoint.formats.gathered import Gathered, tied
from checkpoint.formats.matching import assign
from checkpoint.language import Spec
from checkpoint.lazy import Flat, Lazy, PiecesMissing, Stored, scalar
from checkpoint.source import FP32, FROZEN, PARAM, STEP, Group
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import Opaque, TensorRef
from collectives.errors import CorruptFile

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_(\d+)_model_states\.pt")
_EXPERT_NAME = re.compile(r"(.*deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")
OWN_KEYS = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples",
    "dp_world_size", "mp_world_size", "ds_config", "ds_version", "checkpoint_parallel_dimensions",
    "universal_checkpoint_info", "num_experts", "ds_autoep_layers", "autoep_layers", "folding",
})  # fmt: skip
"""What DeepSpeed itself keeps in the model states; the rest is the job's."""


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def read(folder: Path, spec: Spec | None = None) -> Gathered:
    """Open the folder of a tag.

    `spec` says how tensor parallel shards combine, before what the checkpoint itself says.

    Raises:
        CorruptFile, UnknownPickle, PiecesMissing, PatternMissing: it cannot be read whole.

    """
    files = Files()
    try:
        return _Reader(folder, files, spec).gather()
    except BaseException:
        files.close()
        raise


@dataclass
class _Shard:
    """What one model parallel rank holds of the parameters: by name, in order; shapes are its own."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    states: dict[str, dict[str, Lazy]] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    def put(self, name: str, state: str, tensor: Lazy) -> None:
        self.states.setdefault(name, {})[state] = tensor


class _Reader:
    def __init__(self, folder: Path, files: Files, spec: Spec | None) -> None:
        self.folder, self.files = folder, files
        names = sorted(path.name for path in folder.iterdir())
        self.optim = {(int(m[2]), int(m[1])): m[0] for name in names if (m := _OPTIM.fullmatch(name))}
        self.model = {(int(m[2]), int(m[1] or 0)): m[0] for name in names if (m := _MODEL.fullmatch(name))}
        self.layers = {(int(m[1]), int(m[2] or 0)): m[0] for name in names if (m := _LAYER.fullmatch(name))}
        self.experts = [(int(m[1]), m[0]) for name in names if (m := _EXPERT.fullmatch(name))]
        self.ranks = 1 + max(rank for rank, _ in (*self.model, *self.optim))
        missing = [rank for rank in range(self.ranks) if (rank, 0) not in self.model]
        if missing:
            raise Unreadable(f"{folder}: the model states of model parallel ranks {missing} are missing; copy it whole")
        self.first = self._load(self.model[0, 0])
        self.info = self._info()
        own = spec_of(self.info) if self.info else Spec.built_in("deepspeed")
        self.spec = spec.over(own) if spec else own
        dims = self.first.value.get("checkpoint_parallel_dimensions") or {}
        tp = dims.get("tp_degree") or (1 + max(tp for _, tp in self.layers) if self.layers else self.ranks)
        if not isinstance(tp, int) or tp < 1 or self.ranks % tp:
            raise Unreadable(
                f"{folder}: {self.ranks} model parallel ranks do not divide over tensor parallel {tp}; is a file "
                f"missing?"
            )
        self.tp, self.pp = tp, self.ranks // tp
        self.shared: dict[str, str] = {}
        self.stepped: set[str] = set()

    def _load(self, name: str) -> TorchFile:
        loaded = TorchFile(self.files.get(self.folder / name))
        if not isinstance(loaded.value, dict):
            raise CorruptFile(f"{self.folder / name}: not a DeepSpeed checkpoint: it holds no dict")
        return loaded

    def _info(self) -> dict[str, Any]:
        info = self.first.value.get("universal_checkpoint_info")
        return {str(key): value for key, value in info.items()} if isinstance(info, dict) else {}

    def gather(self) -> Gathered:
        """Put everything together."""
        models = {rank: self.first if rank == 0 else self._load(self.model[rank, 0]) for rank in range(self.ranks)}
        for model in models.values():
            self.shared |= model.value.get("shared_params") or {}
            self.stepped |= {name for row in shape_rows(model.value.get("param_shapes")) for name in row}
        shards = [self._shard(rank, models[rank]) for rank in range(self.ranks)]
        source = Gathered("deepspeed", self.files)
        for name, states in self._united(shards).items():
            for state, tensor in states.items():
                source.add(name, state, tensor)
        source.groups = self._groups(shards)
        self._extras(source)
        return source

    def _shard(self, rank: int, model: TorchFile) -> _Shard:
        shard = _Shard()
        optims = self._optim_files(rank)
        stage3 = bool(optims) and "fp32_flat_groups" in optims[0].value["optimizer_state_dict"]
        rows = shape_rows(model.value.get("param_shapes"))
        shard.shapes = {name: shape_of(shape) for row in rows for name, shape in row.items()}
        if stage3:
            _Zero3(str(self.folder), shard, optims, rows).read()
        elif optims:
            _Zero12(shard, optims, rows).read()
        self._module(rank, shard, model, stage3)
        if not optims and model.value.get("optimizer"):
            _plain_optimizer(shard, model, str(self.folder), self.shared, self.spec)
        return shard

    def _optim_files(self, rank: int) -> list[TorchFile]:
        ranks = sorted(dp for mp, dp in self.optim if mp == rank)
        every = max((dp for _, dp in self.optim), default=-1) + 1
        if ranks != list(range(every)):
            raise Unreadable(
                f"{self.folder}: optimizer states of data parallel ranks {sorted(set(range(every)) - set(ranks))} of "
                f"model parallel rank {rank} are missing; copy the checkpoint whole"
            )
        files = [self._load(self.optim[rank, dp]) for dp in ranks]
        for file in files:
            state = file.value.get("optimizer_state_dict")
            if not isinstance(state, dict):
                raise CorruptFile(f"{file.file.path}: it holds no optimizer_state_dict")
            count = state.get("partition_count", every)
            most = max(count) if isinstance(count, list) and count else count
            if isinstance(most, int) and most != every:
                raise Unreadable(
                    f"{self.folder}: written by {most} data parallel ranks, and the files of {every} are here; copy "
                    f"the checkpoint whole, or remove files of another run"
                )
        return files

    def _module(self, rank: int, shard: _Shard, model: TorchFile, stage3: bool) -> None:
        """Buffers, frozen parameters and 16-bit parameters, as the module stores them."""
        value = model.value
        buffers = set(value.get("buffer_names") or ())
        for name, tensor in self._module_tensors(rank, value, model, shard):
            if name in buffers:
                shard.put(name, PARAM, tensor)
            elif name in self.shared or (stage3 and not tensor.size):
                continue
            elif name in shard.shapes:
                if tensor.dtype != "F32" or FP32 not in shard.states.get(name, {}):
                    shard.put(name, PARAM, tensor)
            elif not stage3:
                shard.put(name, FROZEN if self.optim else PARAM, tensor)
        for name, shape in (value.get("frozen_param_shapes") or {}).items():
            shard.put(name, FROZEN, self._frozen(rank, name, shape_of(shape), value, model, stage3))

    def _frozen(
        self, rank: int, name: str, shape: tuple[int, ...], value: Mapping[str, Any], model: TorchFile, stage3: bool
    ) -> Lazy:
        if not stage3:
            return tensor_of(model, value["frozen_param_fragments"].get(name), name)
        runs, at, total = [], 0, math.prod(shape)
        for dp in sorted(dp for mp, dp in self.model if mp == rank):
            file = self._load(self.model[rank, dp])
            piece = tensor_of(file, (file.value.get("frozen_param_fragments") or {}).get(name), name)
            length = min(piece.size, total - at)
            runs.append((at, piece.flat(0, length)))
            at += length
        return Flat(name, shape, runs)

    def _module_tensors(
        self, rank: int, value: Mapping[str, Any], model: TorchFile, shard: _Shard
    ) -> list[tuple[str, Stored]]:
        module = value.get("module")
        if module is None:
            return self._layer_tensors(rank, shard)
        found = [(name, tensor_of(model, ref, name)) for name, ref in module.items() if isinstance(ref, TensorRef)]
        for mp, file_name in self.experts:
            if mp == rank % self.tp:
                file = self._load(file_name)
                found += [(n, tensor_of(file, ref, n)) for n, ref in file.value.items() if isinstance(ref, TensorRef)]
        return found

    def _layer_tensors(self, rank: int, shard: _Shard) -> list[tuple[str, Stored]]:
        """The layers of a pipeline stage: layer N's tensors are called `N.NAME`, or are those of a tied module."""
        found: dict[str, Stored] = {}
        for (layer, tp), file_name in sorted(self.layers.items()):
            if tp != rank % self.tp:
                continue
            file = self._load(file_name)
            for local, ref in file.value.items():
                if not isinstance(ref, TensorRef):
                    continue
                own = f"{layer}.{local}"
                ties = [n for n in shard.shapes if n.startswith("tied_modules.") and n.split(".", 2)[-1] == local]
                name = ties[0] if ties and own not in self.stepped else own
                # A frozen parameter is in no stage's list; the first stage answers for all of them.
                if name in shard.shapes or (name not in self.stepped and rank < self.tp):
                    found.setdefault(name, tensor_of(file, ref, name))
        return list(found.items())

    def _united(self, shards: Sequence[_Shard]) -> dict[str, dict[str, Lazy]]:
        """Every parameter whole: over the tensor parallel ranks of each stage, then over the stages."""
        stages = [self._stage(shards[stage * self.tp : (stage + 1) * self.tp]) for stage in range(self.pp)]
        whole: dict[str, dict[str, Lazy]] = {}
        for name in dict.fromkeys(name for stage in stages for name in stage):
            holders = [stage[name] for stage in stages if name in stage]
            if len(holders) > 1:  # the first stage's copy is the one that is trained on
                self.spec.combine(name, [next(iter(states.values())) for states in holders], "pp")
            whole[name] = holders[0]
        return whole

    def _stage(self, shards: Sequence[_Shard]) -> dict[str, dict[str, Lazy]]:
        found: dict[str, dict[str, Lazy]] = {}
        for name in dict.fromkeys(name for shard in shards for name in shard.states):
            for state in dict.fromkeys(state for shard in shards for state in shard.states.get(name, {})):
                tensors = [shard.states[name][state] for shard in shards if state in shard.states.get(name, {})]
                found.setdefault(name, {})[state] = self._combined(name, state, tensors)
        return found

    def _combined(self, name: str, state: str, tensors: Sequence[Lazy]) -> Lazy:
        if state == STEP or all(not tensor.shape for tensor in tensors):
            return tensors[0]
        whole = by_affine_map(name, self.info, tensors) if len(tensors) == self.tp > 1 else None
        return self.spec.unpadded(name, whole or self.spec.combine(name, tensors))

    def _groups(self, shards: Sequence[_Shard]) -> list[Group]:
        count = max((len(shard.options) for shard in shards), default=0)
        groups = []
        for index in range(count):
            rows = [shard for shard in shards if index < len(shard.options)]
            names = dict.fromkeys(name for shard in rows for name in shard.groups[index])
            groups.append(Group(tuple(names), rows[0].options[index]))
        return groups

    def _extras(self, source: Gathered) -> None:
        value, left_out = self.first.value, []
        known = {"iteration": value.get("global_steps"), "scheduler": value.get("lr_scheduler")}
        known["ds_config"] = value.get("ds_config")
        known["client_state"] = {key: item for key, item in value.items() if key not in OWN_KEYS} or None
        known["universal_checkpoint_info"] = value.get("universal_checkpoint_info")
        for key in ("global_samples", "skipped_steps", "ds_version"):
            known[key] = value.get(key)
        for key, item in known.items():
            if item is not None:
                source.extras[key], left = self.first.json(item, key)
                left_out += left
        source.extras["tied"] = tied(self.shared)
        dp = 1 + max((dp for _, dp in (*self.optim, *self.model)), default=0)
        source.extras["layout"] = {"tp": self.tp, "pp": self.pp, "dp": dp}
        if left_out:
            source.extras["left_out"] = left_out


class _Zero12:
    """ZeRO-1 and 2 (and the bf16 optimizer): each rank has a flat piece of each group, with addresses by name."""

    def __init__(self, shard: _Shard, files: Sequence[TorchFile], shapes: Sequence[Mapping[str, Any]]) -> None:
        self.shard, self.files, self.shapes = shard, files, shapes

    def read(self) -> None:
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
        local = max((int(m[2]) + 1 for name in self.shapes[group] if (m := _EXPERT_NAME.fullmatch(name))), default=0)
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


class _Zero3:
    """ZeRO-3: every parameter is cut over all ranks, padded to a multiple; sub-groups of them are flat on each rank."""

    def __init__(
        self, where: str, shard: _Shard, files: Sequence[TorchFile], shapes: Sequence[Mapping[str, Any]]
    ) -> None:
        self.where, self.shard, self.files, self.shapes = where, shard, files, shapes

    def read(self) -> None:
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


def _plain_optimizer(shard: _Shard, model: TorchFile, where: str, aliases: dict[str, str], spec: Spec) -> None:
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
                _put(shard, name, FP32, masters[index], model)
            else:
                shard.put(name, FP32, shard.states[name].pop(PARAM))
            for key, value in (inner["state"].get(index) or {}).items():
                _put(shard, name, key, value, model)
            stepped.add(name)
        shard.options.append(options_of(group, model))
        shard.groups.append(list(names))
    _settle(shard, shapes, stepped, aliases)


def _flat_groups(
    shard: _Shard, model: TorchFile, flat: Any, inner: Any, shapes: Mapping[str, tuple[int, ...]], where: str
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
                _put(shard, name, key, ref, model)
        at += count
    shard.options.append(options_of(inner["param_groups"][0], model))
    shard.groups.append(list(shapes))


def _settle(shard: _Shard, shapes: Mapping[str, tuple[int, ...]], stepped: set[str], aliases: dict[str, str]) -> None:
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


def _put(shard: _Shard, name: str, key: str, value: Any, file: TorchFile) -> None:
    if isinstance(value, TensorRef):
        shard.put(name, key, tensor_of(file, value, name))
    elif isinstance(value, int | float):
        shard.put(name, key, scalar(value))


def _flat_states(file: TorchFile, group: int) -> dict[str, Stored | float]:
    """The flat tensors of a group on one rank, and its step."""
    state = file.value["optimizer_state_dict"]
    found: dict[str, Stored | float] = {FP32: tensor_of(file, state["single_partition_of_fp32_groups"][group], FP32)}
    base = state.get("base_optimizer_state")
    if isinstance(base, dict):
        options = base.get("param_groups") or [{}] * (group + 1)
        found |= _states(file, (base.get("state") or {}).get(group), options[group])
    elif isinstance(base, list) and group < len(base):
        found |= _states(file, base[group], {STEP: state.get("base_optimizer_state_step")})
    return found


def _zero3_states(file: TorchFile, index: int) -> dict[str, Stored | float]:
    state = file.value["optimizer_state_dict"]
    flats = state["fp32_flat_groups"]
    if index >= len(flats):
        raise CorruptFile(f"{file.file.path}: it has {len(flats)} flat groups, and the model states name more")
    found: dict[str, Stored | float] = {FP32: tensor_of(file, flats[index], FP32)}
    inner = state.get("optimizer_state_dict") or {}
    group: Mapping[str, Any] = next((g for g in inner.get("param_groups", ()) if index in g.get("params", ())), {})
    return found | _states(file, (inner.get("state") or {}).get(index), group)


def _states(file: TorchFile, state: Any, option: Mapping[str, Any]) -> dict[str, Stored | float]:
    found: dict[str, Stored | float] = {}
    for key, value in (state or {}).items():
        if isinstance(value, TensorRef) and value.shape:
            found[str(key)] = tensor_of(file, value, str(key))
        elif isinstance(value, TensorRef):
            found[str(key)] = number(file, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[str(key)] = float(value)
    if STEP not in found and found and (step := option.get(STEP)) is not None:
        found[STEP] = number(file, step) if isinstance(step, TensorRef) else float(step)
    return found


def number(file: TorchFile, ref: TensorRef) -> float:
    """Return a tensor of one element as a number."""
    from checkpoint.dtypes import NUMPY

    stored = file.stored(ref)
    return float(stored.whole().view(NUMPY[stored.dtype])[0])


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


def _address(address: Any, name: str) -> tuple[int, int]:
    """Start and number of elements of a fragment."""
    get = address.get if isinstance(address, Opaque | dict) else lambda _key: None
    start, numel = get("start"), get("numel")
    if type(start) is not int or type(numel) is not int or start < 0 or numel < 0:
        raise CorruptFile(f"{name}: its address in the flat group is malformed")
    return start, numel


def _global_expert(name: str, first: int) -> str:
    """The name of an expert's parameter with the number that the expert has in the whole model."""
    match = _EXPERT_NAME.fullmatch(name)
    return f"{match[1]}{int(match[2]) + first}{match[3]}" if match else name
