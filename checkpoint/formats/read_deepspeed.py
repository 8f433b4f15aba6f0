"""Reads DeepSpeed's own checkpoints: ZeRO 0 to 3, tensor and pipeline parallel, mixture of experts, frozen parameters.

A folder has `mp_rank_XX_model_states.pt` for each model parallel rank (with ZeRO-3 `zero_pp_rank_DD_mp_rank_XX_...` for
every rank), `layer_NN...-model_states.pt` for each layer of a PipelineModule, `layer_L_expert_E_...` for each expert,
and `[bf16_]zero_pp_rank_DD_mp_rank_XX_optim_states.pt` for each rank. Formats read from DeepSpeed 0.19's `engine.py`,
`stage_1_and_2.py`, `stage3.py`. Found by `checkpoint.formats.detect`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import Files, Unreadable
from checkpoint.formats.deepspeed_plain import plain_optimizer
from checkpoint.formats.deepspeed_states import Shard, shape_of, shape_rows, tensor_of
from checkpoint.formats.deepspeed_tp import by_affine_map, spec_of
from checkpoint.formats.deepspeed_zero import Zero3, Zero12
from checkpoint.formats.gathered import Gathered, tied
from checkpoint.language import Spec
from checkpoint.lazy import Flat, Lazy, Stored
from checkpoint.source import FP32, FROZEN, PARAM, STEP, Group
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import TensorRef
from collectives.errors import CorruptFile

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_(\d+)_model_states\.pt")
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


class _Reader:
    def __init__(self, folder: Path, files: Files, spec: Spec | None) -> None:
        self.folder, self.files = folder, files
        self.loaded: dict[str, TorchFile] = {}
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
        if name not in self.loaded:
            file = TorchFile(self.files.get(self.folder / name))
            if not isinstance(file.value, dict):
                raise CorruptFile(f"{self.folder / name}: not a DeepSpeed checkpoint: it holds no dict")
            self.loaded[name] = file
        return self.loaded[name]

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

    def _shard(self, rank: int, model: TorchFile) -> Shard:
        shard = Shard()
        optims = self._optim_files(rank)
        stage3 = bool(optims) and "fp32_flat_groups" in optims[0].value["optimizer_state_dict"]
        rows = shape_rows(model.value.get("param_shapes"))
        shard.shapes = {name: shape_of(shape) for row in rows for name, shape in row.items()}
        if stage3:
            self._check_ranks(rank, len(optims), rows)
            Zero3(str(self.folder), shard, optims, rows).read()
        elif optims:
            Zero12(shard, optims, rows).read()
        self._module(rank, shard, model, stage3)
        if not optims and model.value.get("optimizer"):
            plain_optimizer(shard, model, str(self.folder), self.shared, self.spec)
        return shard

    def _check_ranks(self, rank: int, count: int, rows: list[dict[str, Any]]) -> None:
        """With ZeRO-3 every data parallel rank has model states, which name the same parameters."""
        held = sorted(dp for mp, dp in self.model if mp == rank)
        if held != list(range(count)):
            missing = sorted(set(range(count)) - set(held))
            raise Unreadable(
                f"{self.folder}: model states of data parallel ranks {missing} are missing; copy the checkpoint whole"
            )
        for dp in held[1:]:
            name = self.model[rank, dp]
            if shape_rows(self._load(name).value.get("param_shapes")) != rows:
                raise CorruptFile(f"{self.folder / name} is of another run: it names other parameters than rank 0's")

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

    def _module(self, rank: int, shard: Shard, model: TorchFile, stage3: bool) -> None:
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
        self, rank: int, value: Mapping[str, Any], model: TorchFile, shard: Shard
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

    def _layer_tensors(self, rank: int, shard: Shard) -> list[tuple[str, Stored]]:
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

    def _united(self, shards: Sequence[Shard]) -> dict[str, dict[str, Lazy]]:
        """Every parameter whole: over the tensor parallel ranks of each stage, then over the stages."""
        stages = [self._stage(shards[stage * self.tp : (stage + 1) * self.tp]) for stage in range(self.pp)]
        whole: dict[str, dict[str, Lazy]] = {}
        for name in dict.fromkeys(name for stage in stages for name in stage):
            holders = [stage[name] for stage in stages if name in stage]
            if len(holders) > 1:  # the first stage's copy is the one that is trained on
                self.spec.combine(name, [next(iter(states.values())) for states in holders], "pp")
            whole[name] = holders[0]
        return whole

    def _stage(self, shards: Sequence[Shard]) -> dict[str, dict[str, Lazy]]:
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

    def _groups(self, shards: Sequence[Shard]) -> list[Group]:
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
