"""Keys of Megatron-Core's `torch_dist` for the names of its models: layers and experts stacked, norms renamed.

The layers' parameters of one kind are one tensor with the layers in front (`decoder.layers.mlp.linear_fc1.weight`, of
`(layers, rows, columns)`), those of experts with layers and experts. A norm has the name that it has where Transformer
Engine joins it with the linear layer behind it. Used by the writer of Megatron checkpoints. Source:
`sharded_state_dict` of `megatron/core/transformer` and `models/gpt/gpt_layer_specs.py` of Megatron-Core 0.16.
"""

import re
from dataclasses import dataclass

_LAYER = re.compile(r"(?P<head>(?:.+\.)?layers)\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<rest>linear_fc[12]\.\w+)")
_GROUPED = re.compile(r"mlp\.experts\.(?P<rest>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)")
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_ROOTS = ("embedding.", "decoder.", "encoder.", "output_layer.", "rotary_pos_emb.", "mtp.")
_SPLIT_DIMS = {
    re.compile(r"(?:.*\.)?(?:linear_qkv|linear_fc1)\.(?:weight|bias)"): 0,
    re.compile(r"(?:.*\.)?(?:linear_proj|linear_fc2)\.weight"): 1,
    re.compile(r"(?:.*\.)?(?:word_embeddings|output_layer)\.weight"): 0,
}
_EXTRA_STATE = re.compile(r"(.*(?:linear_qkv|linear_proj|linear_fc1|linear_fc2))\.weight|(output_layer)\.weight")


@dataclass(frozen=True, slots=True)
class Key:
    """Where a parameter is: `head.tail`, in a stack of layers at `layer` and of experts at `expert`, if it is in such.

    `head` ends where the number of the layer stands in the key of a model whose layers are not alike.
    """

    head: str
    tail: str
    layer: int | None = None
    expert: int | None = None

    @property
    def text(self) -> str:
        """The key in a stack of layers."""
        return f"{self.head}.{self.tail}" if self.head else self.tail

    @property
    def alone(self) -> str:
        """The key without a stack of layers."""
        return self.text if self.layer is None else f"{self.head}.{self.layer}.{self.tail}"


def is_megatron(name: str) -> bool:
    """Whether a parameter of Megatron's models could have this name."""
    return name.startswith(_ROOTS)


def key_of(name: str) -> Key:
    """The key for the name of a parameter in a model of its own, with global numbers of layers and experts."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return Key("", name)
    head, layer, rest = found["head"], int(found["layer"]), found["rest"]
    for ours, theirs in _NORMS.items():
        if rest.startswith(ours):
            return Key(head, theirs + rest.removeprefix(ours), layer)
    expert = _EXPERT.fullmatch(rest) or _GROUPED.fullmatch(rest)
    if expert is not None:
        return Key(head, f"mlp.experts.experts.{expert['rest']}", layer, int(expert["expert"]))
    return Key(head, rest, layer)


def split_dim(key: str) -> int | None:
    """The dimension, without those of the stacks, along which tensor parallel ranks share a parameter."""
    return next((dim for pattern, dim in _SPLIT_DIMS.items() if pattern.fullmatch(key)), None)


def extra_state(key: str) -> str | None:
    """The key of the extra state that Megatron asks for beside this weight."""
    found = _EXTRA_STATE.fullmatch(key)
    return f"{found[1] or found[2]}._extra_state" if found else None
