"""Reads Megatron's legacy checkpoints: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, each rank's own part.

Files say neither how shards combine nor which layers of the model a stage has: the former are the patterns of
`specs/megatron.toml`, the latter follow from the stages in order. Optimizer states are numbered without names
(`matching`), or flat in `distrib_optim.pt` (`megatron_model.buffer_layout`). Source: Megatron-LM's
`megatron/training/checkpointing.py`, and `megatron/core/optimizer` of Megatron-Core 0.16. Found by `detect`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.files import Files, Unreadable
from checkpoint.formats.gathered import Gathered
from checkpoint.formats.matching import assign
from checkpoint.formats.megatron_model import (
    EMBEDDING,
    EXPERT,
    LAYER,
    OUTPUT,
    buffer_layout,
    find_groups,
    grouped,
    groups_of,
    is_expert,
    own_name,
    settings_of,
    spec_of,
)
from checkpoint.language import Spec
from checkpoint.lazy import Lazy, PiecesMissing, Stored, number, scalar
from checkpoint.source import FP32, PARAM, STEP, Group
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import TensorRef
from collectives.errors import CorruptFile

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILE, _OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
_CHUNK = re.compile(r"model(\d*)")


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return any(_RANK.fullmatch(path.name) and (path / _FILE).is_file() for path in folder.iterdir())


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


@dataclass
class _Part:
    """What a rank holds of one chunk of the model: by its own names, and by those in the whole model."""

    names: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    states: dict[str, dict[str, Lazy]] = field(default_factory=dict)


class _Reader:
    def __init__(self, folder: Path, files: Files, spec: Spec | None) -> None:
        self.folder, self.files = folder, files
        self._loaded: dict[tuple[int, int, int], TorchFile] = {}
        found = {path.name: m for path in sorted(folder.iterdir()) if (m := _RANK.fullmatch(path.name))}
        if not found:
            raise Unreadable(f"{folder}: no folder mp_rank_*; name the folder of the iteration")
        self.first = TorchFile(files.get(folder / next(iter(found)) / _FILE))
        if not isinstance(self.first.value, dict):
            raise CorruptFile(f"{self.first.file.path}: it holds no dict")
        self.args = settings_of(self.first.value)
        self.spec = spec_of(self.args, spec)
        self.tp, self.pp, self.ep = (
            self._size(key) for key in ("tensor_model", "pipeline_model", "expert_model")
        )  # fmt: skip
        self.ranks = {self._place(match): name for name, match in found.items()}
        self.tp = max(self.tp, 1 + max(tp for tp, _, _ in self.ranks))
        self.pp = max(self.pp, 1 + max(pp for _, pp, _ in self.ranks))
        self.ep = max(self.ep, 1 + max(ep for _, _, ep in self.ranks))
        places = [(t, p, e) for t in range(self.tp) for p in range(self.pp) for e in range(self.ep)]
        if missing := [place for place in places if place not in self.ranks]:
            raise Unreadable(
                f"{folder}: no files of the ranks (tensor, pipeline, expert parallel) {missing[:4]}; a checkpoint of "
                f"tp={self.tp}, pp={self.pp}, ep={self.ep} has {len(places)} folders; copy it whole"
            )

    def _size(self, key: str) -> int:
        value = self.args.get(f"{key}_parallel_size")
        return value if type(value) is int and value > 0 else 1

    def _place(self, match: re.Match[str]) -> tuple[int, int, int]:
        """Tensor, pipeline and expert parallel rank of a folder: of two numbers, the second is either one of these."""
        tp, second, third = (int(text) if text else 0 for text in match.groups())
        if match[3] is None and match[2] is not None and self.ep > 1 and self.pp == 1:
            return tp, 0, second
        return tp, second, third

    def gather(self) -> Gathered:
        """Put everything together."""
        source = Gathered("megatron-legacy", self.files)
        parts: dict[tuple[int, int, int], list[_Part]] = {}
        files: dict[tuple[int, int, int], TorchFile] = {}
        layers = 0
        chunks = [self._chunks(place) for place in self.ranks]
        for chunk in range(max(chunks)):
            for stage in range(self.pp):
                width = 0
                for place in ((t, stage, e) for t in range(self.tp) for e in range(self.ep)):
                    files[place] = self._load(place)
                    part, width = self._part(files[place], chunk, layers, place[2])
                    parts.setdefault(place, []).append(part)
                layers += width
        for place, file in files.items():
            self._optimizer(place, file, parts[place])
        self._unite(source, parts)
        self._groups(source, files)
        self._extras(source)
        return source

    def _load(self, place: tuple[int, int, int]) -> TorchFile:
        if place not in self._loaded:
            file = TorchFile(self.files.get(self.folder / self.ranks[place] / _FILE))
            if not isinstance(file.value, dict):
                raise CorruptFile(f"{file.file.path}: it holds no dict")
            self._loaded[place] = file
        return self._loaded[place]

    def _chunks(self, place: tuple[int, int, int]) -> int:
        return sum(1 for key in self._load(place).value if isinstance(key, str) and _CHUNK.fullmatch(key))

    def _part(self, file: TorchFile, chunk: int, layers: int, ep: int) -> tuple[_Part, int]:
        """A chunk of a rank's model, and how many layers it has; `layers` come before it."""
        keys = sorted(key for key in file.value if isinstance(key, str) and _CHUNK.fullmatch(key))
        if chunk >= len(keys):
            raise CorruptFile(f"{file.file.path}: it has {len(keys)} chunks of the model, others have more")
        part, numbers = _Part(), set()
        refs = {n: ref for n, ref in file.value[keys[chunk]].items() if isinstance(ref, TensorRef)}
        local = {int(m[2]) for name in refs if (m := EXPERT.fullmatch(own_name(self.spec, name)))}
        for raw, ref in refs.items():
            name = own_name(self.spec, raw.removeprefix("module."))
            if match := LAYER.fullmatch(name):
                numbers.add(int(match[2]))
                name = f"{match[1]}{int(match[2]) + layers}{match[3]}"
            if match := EXPERT.fullmatch(name):
                name = f"{match[1]}{int(match[2]) + ep * len(local)}{match[3]}"
            part.names[raw], part.tensors[name] = name, file.stored(ref)
        return part, len(numbers)

    def _optimizer(self, place: tuple[int, int, int], file: TorchFile, parts: Sequence[_Part]) -> None:
        path = self.folder / self.ranks[place] / _OPTIMIZER
        saved = file.value.get("optimizer")
        if path.is_file():
            self._flat(place, TorchFile(self.files.get(path)), parts, list(find_groups(saved)), file)
        elif saved:
            rows = _optimizers(saved)
            for index, row in enumerate(rows):
                experts = None if len(rows) == 1 else index > 0
                self._numbered(row, file, parts, experts)

    def _numbered(
        self, saved: Mapping[str, Any], file: TorchFile, parts: Sequence[_Part], experts: bool | None
    ) -> None:
        """States that torch's optimizer numbers, group by group."""
        inner = saved.get("optimizer", saved) if "param_groups" not in saved else saved
        groups, states = inner["param_groups"], inner.get("state") or {}
        owner = {name: part for part in parts for name in part.tensors}
        tensors = {n: t for part in parts for n, t in part.tensors.items() if experts in (None, is_expert(n))}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        slots = [[_shape(states.get(index)) for index in group["params"]] for group in groups]
        hints = {n: i for i, names in enumerate(grouped(groups, shapes)) for n in names}
        where = str(file.file.path)
        try:
            named = assign(shapes, slots, [group.get("param_names") for group in groups], where, hints)
        except PiecesMissing:
            named = assign(shapes, slots, [None for _ in groups], where)
        masters = saved.get("fp32_from_fp16_params")
        for index, (group, names) in enumerate(zip(groups, named, strict=True)):
            halves = [name for name in names if tensors[name].dtype != "F32"]
            rows = masters[index] if isinstance(masters, list) and index < len(masters) else []
            master = dict(zip(halves, rows, strict=False))
            for slot, name in zip(group["params"], names, strict=True):
                found = owner[name].states.setdefault(name, {})
                found[FP32] = file.stored(master[name]) if name in master else tensors[name]
                for key, value in (states.get(slot) or {}).items():
                    if isinstance(value, TensorRef):
                        found[key] = file.stored(value)
                    elif key == STEP:
                        found[key] = scalar(value)
                self._step(found, group, states, file)

    def _step(
        self, found: dict[str, Lazy], group: Mapping[str, Any], states: Mapping[Any, Any], file: TorchFile
    ) -> None:
        step = group.get(STEP, states.get("common_step"))
        if STEP in found:
            return
        if isinstance(step, TensorRef):
            step = number(file.stored(step))
        if isinstance(step, int | float):
            found[STEP] = scalar(step)

    def _flat(
        self,
        place: tuple[int, int, int],
        flat: TorchFile,
        parts: Sequence[_Part],
        options: Sequence[Mapping[str, Any]],
        file: TorchFile,
    ) -> None:
        """The distributed optimizer's flat buffers, one for each chunk and dtype, dense parameters before experts."""
        rows = flat.value if isinstance(flat.value, list) else [flat.value]
        for index, row in enumerate(rows):
            experts = None if len(rows) == 1 else index > 0
            if not isinstance(row, dict) or not row.get("buckets_coalesced"):
                raise PiecesMissing(
                    f"{flat.file.path}: its buckets are not joined, as Megatron wrote before February 2024; load and "
                    f"save it with a newer one"
                )
            buffers = [key for key in row if key != "buckets_coalesced"]
            order = [(chunk, dtype) for chunk, part in enumerate(parts) for dtype in _dtypes(part, experts)]
            if len(buffers) != len(order):
                raise PiecesMissing(f"{flat.file.path}: {len(buffers)} buffers, and the model would have {len(order)}")
            for key, (chunk, dtype) in zip(buffers, order, strict=True):
                (states,) = row[key].values()
                self._buffer(place, flat, states, parts[chunk], (chunk, dtype, experts))
        for part in parts:
            names = grouped(options, {name: tensor.shape for name, tensor in part.tensors.items()})
            for option, members in zip(options, names, strict=True):
                for name in members:
                    if name in part.states:
                        self._step(part.states[name], option, {}, file)

    def _buffer(
        self,
        place: tuple[int, int, int],
        file: TorchFile,
        states: Mapping[str, Any],
        part: _Part,
        which: tuple[int, str, bool | None],
    ) -> None:
        chunk, dtype, experts = which
        names = [n for n, t in part.tensors.items() if t.dtype == dtype and experts in (None, is_expert(n))]
        tied = not self.args.get("untie_embeddings_and_output_weights") and self.pp > 1
        params = [(name, part.tensors[name].size, tied and name in (EMBEDDING, OUTPUT)) for name in names]
        overlap = self.args.get("overlap_grad_reduce") and place[1] == 0 and chunk == 0
        size = self.args.get("ddp_bucket_size") or max(
            40_000_000, 1_000_000 * int(self.args.get("data_parallel_size") or 1)
        )
        addresses, sizes = buffer_layout(params, bucket_size=int(size) if overlap else None)
        if states.get("numel_unpadded", sum(sizes)) != sum(sizes):
            raise PiecesMissing(
                f"{file.file.path}: a buffer of {states['numel_unpadded']} elements, and its parameters make up "
                f"{sum(sizes)}; the order of parameters is not that of Megatron-Core's GPT"
            )
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        for name in names:
            address, shape = addresses[name], part.tensors[name].shape
            at = starts[address.bucket]
            for key in ("param", "exp_avg", "exp_avg_sq"):
                if isinstance(states.get(key), TensorRef):
                    piece = file.stored(states[key]).flat(at + address.start, at + address.stop)
                    whole = Stored.packed(piece.file, piece.offset, piece.dtype, shape)
                    part.states.setdefault(name, {})[FP32 if key == "param" else key] = whole

    def _unite(self, source: Gathered, parts: Mapping[tuple[int, int, int], Sequence[_Part]]) -> None:
        """Every parameter whole, over the tensor parallel ranks of its stage; the first expert rank answers for all."""
        tied = not self.args.get("untie_embeddings_and_output_weights")
        for chunk in range(max(map(len, parts.values()))):
            for stage in range(self.pp):
                for ep in range(self.ep):
                    shards = [parts[tp, stage, ep][chunk] for tp in range(self.tp)]
                    for name in shards[0].tensors:
                        copy = name == OUTPUT and tied
                        if not copy and f"{name}|{PARAM}" not in source.entries:
                            self._add(source, name, shards)

    def _add(self, source: Gathered, name: str, shards: Sequence[_Part]) -> None:
        if any(name not in shard.tensors for shard in shards):
            raise PiecesMissing(f"{self.folder}: {name} is not on every tensor parallel rank")
        source.add(name, PARAM, self._combined(name, [shard.tensors[name] for shard in shards]))
        for state in shards[0].states.get(name, {}):
            tensors = [shard.states[name][state] for shard in shards]
            source.add(name, state, tensors[0] if state == STEP else self._combined(name, tensors))

    def _combined(self, name: str, tensors: Sequence[Lazy]) -> Lazy:
        expert_tp = self.args.get("expert_tensor_parallel_size")
        if is_expert(name) and expert_tp == 1:
            return tensors[0]
        return self.spec.unpadded(name, self.spec.combine(name, tensors))

    def _groups(self, source: Gathered, files: Mapping[tuple[int, int, int], TorchFile]) -> None:
        options = list(find_groups(self.first.value.get("optimizer")))
        stepped = {entry.name: entry.shape for entry in source.entries.values() if entry.state == FP32}
        if options and stepped:
            made: list[Group] = groups_of(options, grouped(options, stepped), self.first)
            source.groups = made

    def _extras(self, source: Gathered) -> None:
        left_out: list[str] = []
        value = self.first.value
        known = {"iteration": value.get("iteration"), "args": self.args or None}
        known["scheduler"] = value.get("opt_param_scheduler")
        rng = value.get("rng_state")
        known["rng"] = rng[0] if isinstance(rng, list) and rng else None
        for key, item in known.items():
            if item is not None:
                source.extras[key], left = self.first.json(item, key)
                left_out += left
        source.extras["layout"] = {"tp": self.tp, "pp": self.pp, "ep": self.ep}
        untied = self.args.get("untie_embeddings_and_output_weights")
        source.extras["tied"] = [] if untied or f"{OUTPUT}|{PARAM}" in source.entries else [[EMBEDDING, OUTPUT]]
        if left_out:
            source.extras["left_out"] = left_out


def _optimizers(saved: Any) -> list[Mapping[str, Any]]:
    """One optimizer, or those that are chained."""
    if isinstance(saved, list | tuple):
        return [row for row in saved if isinstance(row, dict)]
    if isinstance(saved, dict) and "param_groups" not in saved and "optimizer" not in saved:
        return [row for row in saved.values() if isinstance(row, dict)]
    return [saved]


def _dtypes(part: _Part, experts: bool | None) -> list[str]:
    return list(dict.fromkeys(t.dtype for n, t in part.tensors.items() if experts in (None, is_expert(n))))


def _shape(state: Any) -> tuple[int, ...] | None:
    tensors = [ref.shape for ref in (state or {}).values() if isinstance(ref, TensorRef) and ref.shape]
    return tensors[0] if tensors else None
