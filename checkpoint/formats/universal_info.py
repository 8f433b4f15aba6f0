"""What `universal_checkpoint_info` of DeepSpeed says of a parameter, as the keys of its atom: how a tensor-parallel job
is to cut it.

Used by the writer of universal folders. Patterns are matched at the beginning of a name, as DeepSpeed does.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.pickling import Made, Name

_SUBPARAM_SHAPE = Name("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")
_NATIVE_EXPERT = "deepspeed_moe.experts.deepspeed_experts."
_OF_THE_WRITER = ("affine_map", "sub_param_shard_widths")
"""Keys that describe shards of the job that wrote the source; whole tensors have none."""


class Merging:
    """The keys beside `param` in the atoms of a checkpoint, by the patterns of its information."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._info = info

    def of(self, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """Keys for one parameter; a plain one is cut along dimension 0."""
        found: dict[str, Any] = {}
        if self._matches("vocabulary_parameter_patterns", name):
            found["vocab_tensor"] = True
        if self._matches("expert_parameter_patterns", name):
            found |= {"is_expert_param": True, "ep_num_experts": shape[0]}
        elif _NATIVE_EXPERT in name:
            # The number in the name is of the whole model; under expert parallelism DeepSpeed would take it for that of
            # a rank and load other experts. No tensor has this many rows, so it refuses.
            found |= {"is_expert_param": True, "ep_num_experts": -1}
        if self._matches("tp_replicated_parameter_patterns", name):
            return found
        if self._matches("parameter_to_average_patterns", name):
            return found
        if self._matches("parameter_with_2_sub_params_cat_dim_0", name):
            return found | {"cat_dim": 0, "param_n_sub_params": 2}
        for one in self._info.get("parameter_with_sub_params") or ():
            if _any(one.get("patterns") or (), name):
                return found | {"sub_param_shape": _sub_params(one, shape)}
        return found | {"cat_dim": 1 if self._matches("parameter_with_row_parallelism_patterns", name) else 0}

    def _matches(self, key: str, name: str) -> bool:
        return _any(self._info.get(key) or (), name)


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _sub_params(one: Mapping[str, Any], shape: tuple[int, ...]) -> Made:
    """DeepSpeed's `SubparamShape`, with the width of every part: older information gives their number alone."""
    dim = int(one["partition_dim"])
    spec = [tuple(size) if isinstance(size, list | tuple) else int(size) for size in one["shape"]]
    widths = spec[dim]
    if isinstance(widths, int):
        spec[dim] = (shape[dim] // widths,) * widths if 0 < widths < shape[dim] else (shape[dim],)
    state = {"patterns": list(one["patterns"]), "shape": tuple(spec), "partition_dim": dim}
    return Made(_SUBPARAM_SHAPE, state)


def written_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """The information to write beside whole tensors: the patterns stay, what described the writer's shards goes."""
    kept = {key: value for key, value in info.items() if key not in _OF_THE_WRITER}
    return {"universal_checkpoint_version": 0.4} | kept
