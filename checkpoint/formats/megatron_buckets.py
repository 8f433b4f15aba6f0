"""The distributed optimizer's `dp_reshardable` form: flat buckets of each model parallel rank, back into parameters.

A key is `[chained_C.]optimizer.distributed.dp_group_idx_G.gbuf_idx_B.dtype_(...).bucket_idx_N.STATE`; G counts tensor
parallel ranks within pipeline stages (for experts: within their expert parallel ranks too). Which parameters a rank has
follows from the settings, in which order from the module's code, and where they lie from `buffer_layout`. The sizes of
the buckets and the masters in them, which are the model's weights before rounding, prove it. Used by
`read_megatron_dist`.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from checkpoint.dtypes import FLOATS
from checkpoint.formats.dcp_metadata import Metadata
from checkpoint.formats.megatron_model import EMBEDDING, EXPERT, LAYER, OUTPUT, buffer_layout, is_expert, numel
from checkpoint.language import Pattern, Spec
from checkpoint.lazy import Cut, Lazy, PiecesMissing, Reshaped, from_numbers, to_numbers
from checkpoint.source import FP32, Entry, blocks
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
"""Order of a layer's modules in Megatron's own GPT layer."""
_NORMS = ("input_layernorm.", "pre_mlp_layernorm.")
_LINEARS = ("self_attention.linear_q", "mlp.linear_fc1.")
_WITHIN = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
_PROOF_BYTES = 1 << 16
"""Bytes of each parameter that prove the order."""


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
        self._read: dict[str, Lazy] = {}
        self.buckets: dict[tuple[str, int, int], dict[int, dict[str, str]]] = {}
        for key in metadata.tensors:
            if match := _KEY.fullmatch(key):
                place = (match["chain"], int(match["group"]), int(match["buffer"]))
                self.buckets.setdefault(place, {}).setdefault(int(match["bucket"]), {})[match["state"]] = key

    def states(self) -> dict[str, dict[str, Lazy]]:
        """States by parameter, whole.

        Raises:
            PiecesMissing: in no order of parameters that Megatron has do the buckets hold the model's weights.

        """
        last: PiecesMissing | None = None
        for fused in itertools.product((False, True), (False, True)):
            try:
                found = self._states(fused)
            except PiecesMissing as error:
                last = last or error
                continue
            if self._proven(found):
                return found
        raise last or PiecesMissing(
            "the distributed optimizer's buckets do not hold the model's weights in any order of parameters that is "
            "known of Megatron-Core's GPT; leave the optimizer out with --weights-only"
        )

    def _states(self, fused: tuple[bool, bool]) -> dict[str, dict[str, Lazy]]:
        shards: dict[str, dict[str, dict[int, Lazy]]] = {}
        for (chain, group, buffer), rows in sorted(self.buckets.items()):
            params = self._params(chain, group, buffer, fused)
            sizes = [self._length(rows, index) for index in range(len(rows))]
            addresses, _ = buffer_layout([(name, numel(shape), shared) for name, shape, shared in params], sizes=sizes)
            for name, shape, _ in params:
                address = addresses[name]
                for state, key in rows[address.bucket].items():
                    piece = Cut(self._bucket(key), Region.flat(address.start, address.stop))
                    kind = FP32 if state == "param" else state
                    shards.setdefault(name, {}).setdefault(kind, {})[group] = Reshaped(piece, shape)
        found: dict[str, dict[str, Lazy]] = {}
        for name, states in shards.items():
            for state, by_group in states.items():
                if name != OUTPUT or name in self.model:
                    found.setdefault(name, {})[state] = self._whole(name, by_group)
        return found

    def _bucket(self, key: str) -> Lazy:
        if key not in self._read:
            self._read[key] = self.metadata.tensor(key)
        return self._read[key]

    def _proven(self, found: Mapping[str, Mapping[str, Lazy]]) -> bool:
        """Whether masters, rounded to the model's dtype, are its parameters: small ones whole, the start of others."""
        for name, states in found.items():
            master, weight = states.get(FP32), self.model[name]
            if master is None or weight.dtype not in FLOATS:
                continue
            box = next(iter(blocks(Entry(name, FP32, "F32", master.shape), _PROOF_BYTES)))
            rounded = from_numbers(to_numbers(master.read(box), master.dtype), weight.dtype)
            if not (rounded == weight.read(box)).all():
                return False
        return True

    def _whole(self, name: str, by_group: Mapping[int, Lazy]) -> Lazy:
        ordered = [shard for _, shard in sorted(by_group.items())]
        return ordered[0] if len(ordered) == 1 else self.spec.combine(name, ordered)

    def _length(self, rows: Mapping[int, Mapping[str, str]], index: int) -> int:
        if index not in rows:
            raise PiecesMissing(f"bucket {index} of the distributed optimizer is missing")
        return self.metadata.tensors[next(iter(rows[index].values()))].shape[0]

    def _params(
        self, chain: str, group: int, buffer: int, fused: tuple[bool, bool]
    ) -> list[tuple[str, tuple[int, ...], bool]]:
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
        rows = [(name, self._local(name, tp), False) for name in sorted(names, key=lambda n: self._order(n, fused))]
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

    def _order(self, name: str, fused: tuple[bool, bool]) -> tuple[Any, ...]:
        """Place of a parameter among those of the model; `fused`: the norms of attention and of the MLP, as parts of
        the linear layers behind them (Transformer Engine)."""
        leaf = name.rpartition(".")[2]
        match = LAYER.fullmatch(name)
        if match is None:
            return (0 if name.startswith("embedding.") else 2, "output" in name, "position" in name, _within(leaf))
        inner = match[3][1:]
        module = next((i for i, start in enumerate(_ORDER) if inner.startswith(start)), len(_ORDER))
        expert = EXPERT.fullmatch(name)
        local = (int(expert[2]), expert[3].rpartition(".")[0]) if expert else (0, "")
        for norm, linear, inside in zip(_NORMS, _LINEARS, fused, strict=True):
            if inside and inner.startswith(norm):
                module, leaf = _ORDER.index(linear), "layer_norm_" + leaf
        return (1, int(match[2]), module, *local, _within(leaf), inner)


def _within(leaf: str) -> int:
    return _WITHIN.index(leaf) if leaf in _WITHIN else len(_WITHIN)


def _size(args: Mapping[str, Any], key: str, default: int = 1) -> int:
    value = args.get(key)
    return value if type(value) is int and value > 0 else default
