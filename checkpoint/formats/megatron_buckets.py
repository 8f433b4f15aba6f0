"""The distributed optimizer's `dp_reshardable` form: flat buckets of each model parallel rank, back into parameters.

A key is `[chained_C.]optimizer.distributed.dp_group_idx_G.gbuf_idx_B.dtype_(...).bucket_idx_N.STATE`; G counts tensor
parallel ranks within pipeline stages (for experts: within their expert parallel ranks too). Which parameters a rank has
follows from the settings, in which order from the module's code, and where they lie from `buffer_layout`; sizes of the
buckets, which the checkpoint keeps, prove it. Used by `read_megatron_dist`.
"""

import re
from collections.abc import Mapping
from typing import Any

from checkpoint.formats.dcp_metadata import Metadata
from checkpoint.formats.megatron_model import EMBEDDING, EXPERT, LAYER, OUTPUT, buffer_layout, is_expert, numel
from checkpoint.language import Pattern, Spec
from checkpoint.lazy import Cut, Lazy, PiecesMissing, Reshaped
from checkpoint.source import FP32
from collectives.region import Region

_KEY = re.compile(
    r"(?P<chain>(?:chained_\d+\.)?)optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)\."
    r"dtype_(?P<dtype>.+)\.bucket_idx_(?P<bucket>\d+)\.(?P<state>\w+)"
)
_ORDER = (
    "input_layernorm.", "self_attention.linear_proj.", "self_attention.linear_q", "self_attention.linear_kv",
    "self_attention.q_layernorm.", "self_attention.k_layernorm.", "self_attention.", "pre_mlp_layernorm.",
    "mlp.router.", "mlp.experts.", "mlp.shared_experts.", "mlp.linear_fc1.", "mlp.linear_fc2.", "mlp.",
)  # fmt: skip
"""Order of a layer's modules in Megatron's own GPT layer; `_fused` moves norms that Transformer Engine fuses."""
_WITHIN = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")


class Buckets:
    """The states of all parameters, from the buckets of all model parallel ranks."""

    def __init__(self, metadata: Metadata, args: Mapping[str, Any], spec: Spec, model: Mapping[str, Lazy]) -> None:
        self.metadata, self.args, self.spec, self.model = metadata, args, spec, model
        self.tp = _size(args, "tensor_model_parallel_size")
        self.pp = _size(args, "pipeline_model_parallel_size")
        self.ep = _size(args, "expert_model_parallel_size")
        self.expert_tp = _size(args, "expert_tensor_parallel_size", self.tp)
        if (args.get("virtual_pipeline_model_parallel_size") or 1) != 1:
            raise PiecesMissing(
                "the distributed optimizer's buckets of interleaved pipeline stages cannot be put back into "
                "parameters; save with --dist-ckpt-optim-fully-reshardable, or leave them out with --weights-only"
            )
        self.buckets: dict[tuple[str, int, int], dict[int, dict[str, str]]] = {}
        for key in metadata.tensors:
            if match := _KEY.fullmatch(key):
                place = (match["chain"], int(match["group"]), int(match["buffer"]))
                self.buckets.setdefault(place, {}).setdefault(int(match["bucket"]), {})[match["state"]] = key

    def states(self) -> dict[str, dict[str, Lazy]]:
        """States by parameter, whole."""
        shards: dict[str, dict[str, dict[int, Lazy]]] = {}
        for (chain, group, buffer), rows in sorted(self.buckets.items()):
            params = self._params(chain, group, buffer)
            sizes = [self._length(rows, index) for index in range(len(rows))]
            addresses, _ = buffer_layout([(name, numel(shape), shared) for name, shape, shared in params], sizes=sizes)
            for name, shape, _ in params:
                address = addresses[name]
                for state, key in rows[address.bucket].items():
                    piece = Cut(self.metadata.tensor(key), Region.flat(address.start, address.stop))
                    kind = FP32 if state == "param" else state
                    shards.setdefault(name, {}).setdefault(kind, {})[group] = Reshaped(piece, shape)
        found: dict[str, dict[str, Lazy]] = {}
        for name, states in shards.items():
            for state, by_group in states.items():
                if name != OUTPUT or name in self.model:
                    found.setdefault(name, {})[state] = self._whole(name, by_group)
        return found

    def _whole(self, name: str, by_group: Mapping[int, Lazy]) -> Lazy:
        ordered = [shard for _, shard in sorted(by_group.items())]
        return ordered[0] if len(ordered) == 1 else self.spec.combine(name, ordered)

    def _length(self, rows: Mapping[int, Mapping[str, str]], index: int) -> int:
        if index not in rows:
            raise PiecesMissing(f"bucket {index} of the distributed optimizer is missing")
        return self.metadata.tensors[next(iter(rows[index].values()))].shape[0]

    def _params(self, chain: str, group: int, buffer: int) -> list[tuple[str, tuple[int, ...], bool]]:
        """The parameters of a buffer in the order of the model: name, shape of this rank's shard, shared embedding."""
        experts = any(is_expert(name) for name in self.model) and (chain or buffer) not in ("", 0, "chained_0.")
        if experts:
            tp, ep, pp = group % self.expert_tp, group // self.expert_tp % self.ep, group // self.expert_tp // self.ep
        else:
            tp, ep, pp = group % self.tp, 0, group // self.tp
        names = [n for n in self.model if self._on_stage(n, pp) and is_expert(n) == experts]
        if experts:
            names = [n for n in names if self._on_expert_rank(n, ep)]
        tied = not self.args.get("untie_embeddings_and_output_weights")
        rows = [(name, self._local(name, tp), False) for name in sorted(names, key=self._order)]
        if not experts and tied and self.pp > 1:
            rows = [(n, shape, n == EMBEDDING) for n, shape, _ in rows]
            if pp == self.pp - 1:
                rows.append((OUTPUT, self._local(EMBEDDING, tp), True))
        return rows

    def _on_stage(self, name: str, stage: int) -> bool:
        match = LAYER.fullmatch(name)
        if match is None:
            last = name.startswith(("decoder.final", "output_layer", "final_"))
            return stage == (self.pp - 1 if last else 0)
        start = sum(self._layers(earlier) for earlier in range(stage))
        return start <= int(match[2]) < start + self._layers(stage)

    def _layers(self, stage: int) -> int:
        """How many layers a pipeline stage has."""
        total = _size(self.args, "num_layers")
        first, last = (
            self.args.get("decoder_first_pipeline_num_layers"),
            self.args.get("decoder_last_pipeline_num_layers"),
        )
        if stage == 0 and first:
            return int(first)
        if stage == self.pp - 1 and last:
            return int(last)
        given = (1 if first else 0) + (1 if last else 0)
        return (total - (first or 0) - (last or 0)) // max(1, self.pp - given)

    def _on_expert_rank(self, name: str, ep: int) -> bool:
        match = EXPERT.fullmatch(name)
        count = _size(self.args, "num_experts")
        each = max(1, count // self.ep)
        return match is not None and int(match[2]) // each == ep

    def _local(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor parallel rank's shard."""
        shape, parts = self.model[name].shape, self.expert_tp if is_expert(name) else self.tp
        pattern: Pattern = self.spec.pattern(name)
        if parts == 1 or pattern.how != "fragment":
            return shape
        dim = pattern.dim
        if shape[dim] % parts:
            raise PiecesMissing(
                f"{name}: dimension {dim} of {shape} does not divide over {parts} tensor parallel ranks"
            )
        return (*shape[:dim], shape[dim] // parts, *shape[dim + 1 :])

    def _order(self, name: str) -> tuple[Any, ...]:
        """Place of a parameter among those of the model."""
        match = LAYER.fullmatch(name)
        if match is None:
            return (0 if name.startswith("embedding.") else 2, "position" in name, name)
        inner = match[3][1:]
        module = next((i for i, start in enumerate(_ORDER) if inner.startswith(start)), len(_ORDER))
        if self._fused:
            module, inner = _moved(module, inner)
        expert = EXPERT.fullmatch(name)
        leaf = inner.rpartition(".")[2]
        within = _WITHIN.index(leaf) if leaf in _WITHIN else len(_WITHIN)
        local = (int(expert[2]), expert[3].rpartition(".")[0]) if expert else (0, "")
        return (1, int(match[2]), module, *local, within, inner)

    @property
    def _fused(self) -> bool:
        """Whether norms are parts of the linear layers behind them (Transformer Engine)."""
        return self.args.get("transformer_impl") == "transformer_engine"


def _moved(module: int, inner: str) -> tuple[int, str]:
    """A norm's place when it is the first parameter of the linear layer behind it."""
    for norm, linear in (("input_layernorm.", "self_attention.linear_q"), ("pre_mlp_layernorm.", "mlp.linear_fc1.")):
        if inner.startswith(norm):
            return _ORDER.index(linear), "layer_norm_" + inner.removeprefix(norm)
    return module, inner


def _size(args: Mapping[str, Any], key: str, default: int = 1) -> int:
    value = args.get(key)
    return value if type(value) is int and value > 0 else default
