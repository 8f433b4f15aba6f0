"""Reads DeepSpeed's universal checkpoints: `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` beside the model states.

ZeRO-1/2 writes atoms as dicts with `param`; ZeRO-3 as flat tensors, whose shapes and step are elsewhere. Source:
`deepspeed/checkpoint/ds_to_universal.py` of DeepSpeed 0.19. Found by `checkpoint.formats.detect`.
"""

import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpoint.files import Files, Unreadable
from checkpoint.formats.deepspeed_states import options_of, shape_of, shape_rows, tensor_of
from checkpoint.formats.deepspeed_tp import by_affine_map, spec_of
from checkpoint.formats.gathered import Gathered, tied
from checkpoint.formats.read_deepspeed import OWN_KEYS
from checkpoint.language import Spec
from checkpoint.lazy import Flat, Lazy, PiecesMissing, Stored, number, scalar
from checkpoint.source import FP32, FROZEN, PARAM, STEP, Group
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import TensorRef
from collectives.errors import CorruptFile

_MODEL = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return (folder / "zero").is_dir() and any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def read(folder: Path, spec: Spec | None = None) -> Gathered:
    """Open the folder of a tag. Tensors are whole already, so `spec` has only names to add."""
    files = Files()
    try:
        return _Reader(folder, files).gather()
    except BaseException:
        files.close()
        raise


class _Reader:
    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self.files = folder, files
        names = sorted(path.name for path in folder.iterdir() if _MODEL.fullmatch(path.name))
        if not names or not (folder / "zero").is_dir():
            raise Unreadable(f"{folder}: no universal checkpoint: zero/ or *_model_states.pt is missing")
        ranks: dict[int, str] = {}
        for (
            name
        ) in names:  # "mp_rank_..." comes before "zero_pp_rank_0_mp_rank_..." of the same rank, and says the same
            match = _MODEL.fullmatch(name)
            ranks.setdefault(int(match[1]) if match else 0, name)
        self.models = [self._load(folder / name) for _, name in sorted(ranks.items())]
        self.groups = [row for model in self.models for row in [shape_rows(model.value.get("param_shapes"))]]
        self.optimizer = self._optional(folder / "zero" / "optimizer_state.pt")

    def _load(self, path: Path) -> TorchFile:
        loaded = TorchFile(self.files.get(path))
        if not isinstance(loaded.value, dict):
            raise CorruptFile(f"{path}: it holds no dict")
        return loaded

    def _optional(self, path: Path) -> TorchFile | None:
        return self._load(path) if path.exists() else None

    def gather(self) -> Gathered:
        """Put everything together."""
        source = Gathered("deepspeed-universal", self.files)
        shapes: dict[str, tuple[int, ...]] = {}
        whole = len(self.models) == 1  # shapes of a tensor parallel rank are those of its shards
        for rows in self.groups:
            for row in rows:
                for name, shape in row.items():
                    shapes.setdefault(name, shape_of(shape))
        folders = {path.relative_to(self.folder / "zero").as_posix(): path for path in self._folders()}
        kept = self._in_model_states()
        for name in [name for name in folders if name in kept and name not in shapes]:
            del folders[name]  # a copy of the model states, cast to fp32; they have the tensor itself
        order = dict.fromkeys([name for name in shapes if name in folders] + sorted(folders))
        for name in order:
            self._parameter(
                source, name, folders[name], shapes.get(name) if whole else None, bool(shapes) and name not in shapes
            )
        self._module(source, set(shapes))
        source.groups = self._groups(set(folders))
        self._extras(source)
        return source

    def _in_model_states(self) -> set[str]:
        """Names of buffers, aliases and frozen parameters that the model states hold."""
        found: set[str] = set()
        for model in self.models:
            module = model.value.get("module") or {}
            found |= {name for name, ref in module.items() if isinstance(ref, TensorRef) and 0 not in ref.shape}
            for key in ("buffer_names", "shared_params", "frozen_param_shapes"):
                found |= set(model.value.get(key) or ())
        return found

    def _folders(self) -> list[Path]:
        return sorted(path.parent for path in (self.folder / "zero").rglob("fp32.pt"))

    def _parameter(
        self, source: Gathered, name: str, folder: Path, shape: tuple[int, ...] | None, frozen: bool
    ) -> None:
        step: Lazy | None = None
        for path in sorted(folder.glob("*.pt"), key=lambda path: (path.stem != FP32, path.stem)):
            file = TorchFile(self.files.get(path))
            if path.stem == STEP:
                step = _step(file)
                continue
            tensor = self._atom(file, name, shape)
            source.add(name, FROZEN if frozen and path.stem == FP32 else path.stem, tensor)
        if step is None and not frozen and (found := self._common_step(name)) is not None:
            step = scalar(found)
        if step is not None:
            source.add(name, STEP, step)

    def _atom(self, file: TorchFile, name: str, shape: tuple[int, ...] | None) -> Lazy:
        value = file.value.get("param") if isinstance(file.value, dict) else file.value
        tensor = tensor_of(file, value, name)
        if len(tensor.shape) == 1 and shape is not None and tensor.shape != shape:
            if tensor.size != math.prod(shape):
                raise PiecesMissing(f"{file.file.path}: {tensor.size} elements, and {name} has shape {shape}")
            return Stored.packed(tensor.file, tensor.offset, tensor.dtype, shape)
        return tensor

    def _common_step(self, name: str) -> float | None:
        """The step of ZeRO-3: of the parameter's sub-group in the first rank's optimizer state."""
        if self.optimizer is None:
            return None
        inner = self.optimizer.value.get("optimizer_state_dict") or {}
        index = next((i for rows in self.groups for i, row in enumerate(rows) if name in row), 0)
        states: dict[Any, Any] = inner.get("state") or {}
        state: dict[str, Any] = states.get(index) or next(iter(states.values()), {})
        found = state.get(STEP)
        if found is None:
            groups = inner.get("param_groups") or self.optimizer.value.get("param_groups") or [{}]
            found = next((group.get(STEP) for group in groups if group.get(STEP) is not None), None)
        return number(self.optimizer.stored(found)) if isinstance(found, TensorRef) else found

    def _module(self, source: Gathered, stepped: set[str]) -> None:
        """Buffers, frozen parameters and 16-bit parameters of the model states, over the tensor parallel ranks."""
        first = self.models[0].value
        buffers, shared = set(first.get("buffer_names") or ()), set()
        for model in self.models:
            shared |= set(model.value.get("shared_params") or ())
        for name, ref in (first.get("module") or {}).items():
            if not isinstance(ref, TensorRef) or name in shared or not math.prod(ref.shape):
                continue
            if name in buffers:
                source.add(name, PARAM, self.models[0].stored(ref))
            elif name in stepped:
                if ref.dtype != "F32":
                    source.add(name, PARAM, self._over_ranks(name))
            elif f"{name}|{FROZEN}" not in source.entries:
                source.add(name, FROZEN, self._over_ranks(name))
        for name in first.get("frozen_param_shapes") or {}:
            if f"{name}|{FROZEN}" not in source.entries:
                source.add(name, FROZEN, self._frozen(name))

    def _over_ranks(self, name: str) -> Lazy:
        """A tensor of the model states, of which each tensor parallel rank has a shard."""
        info = self.models[0].value.get("universal_checkpoint_info")
        info = info if isinstance(info, dict) else {}
        shards: list[Lazy] = [tensor_of(model, model.value["module"].get(name), name) for model in self.models]
        if len(shards) == 1:
            return shards[0]
        spec = spec_of(info) if info else Spec.built_in("deepspeed")
        return spec.unpadded(name, by_affine_map(name, info, shards) or spec.combine(name, shards))

    def _frozen(self, name: str) -> Lazy:
        """A frozen parameter: whole, or (ZeRO-3) in pieces, one for each rank, the last ones padded."""
        shape = shape_of(self.models[0].value["frozen_param_shapes"][name])
        runs, at, total = [], 0, math.prod(shape)
        for model in self._ranks:
            piece = tensor_of(model, (model.value.get("frozen_param_fragments") or {}).get(name), name)
            length = min(piece.size, total - at)
            runs.append((at, piece.flat(0, length)))
            at += length
        return Flat(name, shape, runs)

    @cached_property
    def _ranks(self) -> list[TorchFile]:
        """The model states of every data parallel rank (ZeRO-3), else those that there are."""
        numbered = {
            int(match[1]): path
            for path in self.folder.iterdir()
            if (match := re.fullmatch(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt", path.name))
        }
        return [self._load(path) for _, path in sorted(numbered.items())] or self.models

    def _groups(self, names: set[str]) -> list[Group]:
        """Options of every group; names from the model states, sub-groups of ZeRO-3 through their numbers."""
        if self.optimizer is None:
            return []
        value = self.optimizer.value
        inner = (value.get("optimizer_state_dict") or {}).get("param_groups")
        options = value.get("param_groups") or inner or []
        found = []
        for index, option in enumerate(options):
            members: dict[str, None] = {}
            for rows in self.groups:
                subs = option.get("params") if inner else [index]
                if not inner or len(rows) == len(options):
                    subs = [index]
                for sub in subs or ():
                    members |= dict.fromkeys(name for name in (rows[sub] if sub < len(rows) else ()) if name in names)
            found.append(Group(tuple(members), options_of(option, self.optimizer)))
        return found

    def _extras(self, source: Gathered) -> None:
        value, left_out = self.models[0].value, []
        known: dict[str, Any] = {"iteration": value.get("global_steps"), "scheduler": value.get("lr_scheduler")}
        known["client_state"] = {key: item for key, item in value.items() if key not in OWN_KEYS} or None
        for key in ("ds_config", "universal_checkpoint_info", "global_samples", "skipped_steps", "ds_version"):
            known[key] = value.get(key)
        for key, item in known.items():
            if item is not None:
                source.extras[key], left = self.models[0].json(item, key)
                left_out += left
        aliases: dict[str, str] = {}
        for model in self.models:
            aliases |= model.value.get("shared_params") or {}
        source.extras["tied"] = tied(aliases)
        if left_out:
            source.extras["left_out"] = left_out


def _step(file: TorchFile) -> Lazy:
    """A step counter: a tensor, or a number."""
    value = file.value
    if isinstance(value, TensorRef):
        return file.stored(value)
    if isinstance(value, int | float):
        return scalar(value)
    raise CorruptFile(f"{file.file.path}: it holds no step")
