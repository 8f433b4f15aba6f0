"""Reads Megatron-Core's `torch_dist` checkpoints: a DCP folder of stacked layers, and `common.pt` beside it.

Keys are those of `sharded_state_dict`: homogeneous layers are one tensor with the layer as its first dimension, experts
have one more. States of the optimizer are `optimizer.state.STATE.KEY`; with the distributed optimizer in its
`dp_reshardable` form they are flat buckets for each model parallel rank instead. Source:
`megatron/core/{dist_checkpointing,optimizer}` of Megatron-Core 0.16. Found by `checkpoint.formats.detect`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import Files, Unreadable
from checkpoint.formats.dcp_metadata import METADATA, Metadata
from checkpoint.formats.gathered import Gathered
from checkpoint.formats.megatron_buckets import Buckets
from checkpoint.formats.megatron_model import (
    EMBEDDING,
    OUTPUT,
    find_groups,
    grouped,
    groups_of,
    own_name,
    settings_of,
    spec_of,
)
from checkpoint.language import Spec
from checkpoint.lazy import Cut, Lazy, Part, PiecesMissing, Placed, Reshaped, number, scalar
from checkpoint.source import FP32, PARAM, STEP
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import TensorRef
from collectives.errors import CorruptFile
from collectives.region import Region

COMMON = "common.pt"
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_STACKED = re.compile(r"((?:.*\.)?layers)\.([a-z].*)")
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.experts)\.(linear_fc[12]\.(?:weight|bias))")
_MASTERS = {"param": FP32, "fp32_param": FP32}


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return (folder / METADATA).is_file() and ((folder / COMMON).is_file() or _is_said(folder / "metadata.json"))


def read(folder: Path, spec: Spec | None = None) -> Gathered:
    """Open the folder of an iteration.

    Raises:
        CorruptFile, UnknownPickle, PiecesMissing, PatternMissing, Unreadable: it cannot be read whole.

    """
    files = Files()
    try:
        return _Reader(folder, files, spec).gather()
    except BaseException:
        files.close()
        raise


def _is_said(path: Path) -> bool:
    """Whether Megatron's note of its backends is there."""
    return path.is_file() and b"sharded_backend" in path.read_bytes()[:1000]


class _Reader:
    def __init__(self, folder: Path, files: Files, spec: Spec | None) -> None:
        if not (folder / COMMON).is_file():
            raise Unreadable(f"{folder / COMMON} is missing; copy the checkpoint whole")
        self.common = TorchFile(files.get(folder / COMMON))
        if not isinstance(self.common.value, dict):
            raise CorruptFile(f"{folder / COMMON}: it holds no dict")
        self.value: Mapping[str, Any] = self.common.value
        self.args = settings_of(self.value)
        self.spec = spec_of(self.args, spec)
        self.metadata = Metadata(folder, files)
        self.source = Gathered("megatron", files)

    def gather(self) -> Gathered:
        """Put everything together."""
        model: dict[str, Lazy] = {}
        states: dict[str, dict[str, Lazy]] = {}
        for key in self.metadata.tensors:
            if key.startswith("optimizer.distributed.") or ".optimizer.distributed." in key:
                continue
            match = _STATE.fullmatch(key)
            state = _MASTERS.get(match[1], match[1]) if match else PARAM
            for name, tensor in self._named(match[2] if match else key, self._tensor(key, match)):
                if match:
                    states.setdefault(name, {}).setdefault(state, tensor)
                else:
                    model[name] = tensor
        if self._bucketed():
            states |= Buckets(self.metadata, self.args, self.spec, model).states()
        steps = self._groups(model, states)
        for name, tensor in model.items():
            self._add(name, tensor, states.get(name, {}), steps.get(name))
        self._extras(model)
        return self.source

    def _bucketed(self) -> bool:
        return any(".bucket_idx_" in key for key in self.metadata.tensors)

    def _add(self, name: str, tensor: Lazy, states: Mapping[str, Lazy], step: float | None) -> None:
        self.source.add(name, PARAM, self.spec.unpadded(name, tensor))
        if not states:
            return
        for state, value in {FP32: tensor, **states}.items():
            self.source.add(name, state, self.spec.unpadded(name, value))
        if step is not None:
            self.source.add(name, STEP, scalar(step))

    def _tensor(self, key: str, match: re.Match[str] | None) -> Lazy:
        tensor = self.metadata.tensor(key)
        if match and match[2] in self.metadata.tensors:
            model = self.metadata.tensors[match[2]]
            if model.shape != tensor.shape:
                return _unflattened(key, tensor, model.shape, [chunk.box for chunk in model.chunks])
        return tensor

    def _named(self, key: str, tensor: Lazy) -> list[tuple[str, Lazy]]:
        """The parameters that a tensor of the folder stands for: one for each layer and expert."""
        rows = [(key, tensor)]
        if match := _STACKED.fullmatch(key):
            rows = [(f"{match[1]}.{n}.{match[2]}", _row(tensor, n)) for n in range(tensor.shape[0])]
        found = []
        for name, row in rows:
            if experts := _EXPERTS.fullmatch(name):
                pieces = [(f"{experts[1]}.{n}.{experts[2]}", _row(row, n)) for n in range(row.shape[0])]
            else:
                pieces = [(name, row)]
            found += [(own_name(self.spec, name), piece) for name, piece in pieces]
        return found

    def _groups(self, model: Mapping[str, Lazy], states: Mapping[str, Any]) -> dict[str, float]:
        """Set the groups, and return the step of each parameter."""
        options = list(find_groups(self.value.get("optimizer")))
        file = self.common
        if not options:
            options, file = self._object_groups()
        if not options or not states:
            return {}
        names = grouped(options, {name: tensor.shape for name, tensor in model.items() if name in states})
        self.source.groups = groups_of(options, names, file)
        common = _common_step(self.value.get("optimizer"), self.common)
        steps: dict[str, float] = {}
        for option, members in zip(options, names, strict=True):
            step = option.get("step", common)
            if isinstance(step, TensorRef):
                step = number(file.stored(step))
            if isinstance(step, int | float):
                steps |= dict.fromkeys(members, float(step))
        return steps

    def _object_groups(self) -> tuple[list[Mapping[str, Any]], TorchFile]:
        """Groups that each model parallel rank keeps for itself; those of the first rank of each optimizer hold."""
        keys = [k for k in self.metadata.objects if re.search(r"optimizer\.distributed\.dp_group_idx_0\.optimizer/", k)]
        found: list[Mapping[str, Any]] = []
        file = self.common
        for key in sorted(keys):
            value, file = self.metadata.object(key)
            found += find_groups(value if isinstance(value, dict | list) else {})
        return found, file

    def _extras(self, model: Mapping[str, Lazy]) -> None:
        left_out: list[str] = []
        scheduler = self.value.get("opt_param_scheduler")
        known = {"iteration": self.value.get("iteration"), "args": self.args or None, "scheduler": scheduler}
        known["rng"] = self._rng()
        known["content_metadata"] = self.value.get("content_metadata")
        for key, item in known.items():
            if item is not None:
                self.source.extras[key], left = self.common.json(item, key)
                left_out += left
        self.source.extras["layout"] = {
            axis: self.args[key]
            for axis, key in (
                ("tp", "tensor_model_parallel_size"),
                ("pp", "pipeline_model_parallel_size"),
                ("ep", "expert_model_parallel_size"),
            )
            if type(self.args.get(key)) is int
        }
        untied = self.args.get("untie_embeddings_and_output_weights")
        self.source.extras["tied"] = [[EMBEDDING, OUTPUT]] if OUTPUT not in model and not untied else []
        if left_out:
            self.source.extras["left_out"] = left_out

    def _rng(self) -> Any:
        """Random states of the first rank."""
        key = next((key for key in sorted(self.metadata.objects) if key.startswith("rng_state/")), None)
        if key is None:
            return None
        value, file = self.metadata.object(key)
        return file.json(value, "rng")[0]


def _row(tensor: Lazy, index: int) -> Lazy:
    start = (index, *(0 for _ in tensor.shape[1:]))
    return Cut(tensor, Region(start, (index + 1, *tensor.shape[1:])), (0,))


def _unflattened(key: str, tensor: Lazy, shape: tuple[int, ...], boxes: Sequence[Region]) -> Lazy:
    """A state whose local shards were flattened: its last dimension holds a shard's elements, the others the grid."""
    grid = tensor.shape[:-1]
    if len(grid) != len(shape) or any(n % g for n, g in zip(shape, grid, strict=True)):
        raise PiecesMissing(f"{key}: stored with shape {tensor.shape}, which does not fit the parameter's {shape}")
    local = tuple(n // g for n, g in zip(shape, grid, strict=True))
    parts = []
    for box in dict.fromkeys(boxes):
        cell = tuple(first // extent for first, extent in zip(box.start, local, strict=True))
        if box.shape != local:
            raise PiecesMissing(f"{key}: a shard of {box.shape}, where all have {local}")
        row = Cut(tensor, Region((*cell, 0), (*(c + 1 for c in cell), tensor.shape[-1])), tuple(range(len(cell))))
        parts.append(Part(box, Reshaped(row, local), (0,) * len(shape)))
    return Placed(key, shape, parts)


def _common_step(optimizer: Any, file: TorchFile) -> float | None:
    """The step that all parameters share."""
    if isinstance(optimizer, dict):
        state = optimizer.get("state")
        if isinstance(state, dict) and "common_step" in state:
            step = state["common_step"]
            return number(file.stored(step)) if isinstance(step, TensorRef) else float(step)
        for item in optimizer.values():
            if (found := _common_step(item, file)) is not None:
                return found
    if isinstance(optimizer, list | tuple):
        return next((found for item in optimizer if (found := _common_step(item, file)) is not None), None)
    return None
