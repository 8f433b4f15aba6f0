"""What `common.pt` of a Megatron checkpoint holds: the job's arguments, iteration, the optimizer's groups and step.

Used by the writer of Megatron checkpoints. Groups and step are in the places where each of Megatron's optimizers looks
for them: `state`, `param_groups` (fp32), `optimizer` (16-bit parameters; distributed).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.pickling import Made, Name
from checkpoint.source import STEP, Group, Source
from checkpoint.torch_file import Saved, saved, scalar

_GROUP_DEFAULTS = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "default_config": True}
"""What Megatron tells its groups apart by, where the source has not got it."""


def common(source: Source, step: int) -> dict[str, Any]:
    """Return the value to write."""
    found: dict[str, Any] = {
        "checkpoint_version": 3.0,
        "iteration": step,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        },
    }
    if isinstance(source.extras.get("args"), Mapping):
        found["args"] = Made(Name("argparse", "Namespace"), dict(source.extras["args"]))
    if source.groups:
        found["optimizer"] = _optimizers(source)
    if isinstance(source.extras.get("scheduler"), Mapping):
        found["opt_param_scheduler"] = dict(source.extras["scheduler"])
    return found


def _optimizers(source: Source) -> dict[Any, Any]:
    """The optimizer; where there are experts, two of them, as Megatron chains them: the dense one and the experts'."""
    dense = [group for group in source.groups if not group.options.get("is_expert_parallel")]
    experts = [group for group in source.groups if group.options.get("is_expert_parallel")]
    if not experts or not dense:
        return _optimizer(source, source.groups)
    return {0: _optimizer(source, dense), 1: _optimizer(source, experts)}


def _optimizer(source: Source, groups: Sequence[Group]) -> dict[str, Any]:
    entry = next((e for e in source.entries.values() if e.state == STEP), None)
    number = float(source.extras.get("iteration") or 0)
    step: Saved = scalar(number) if entry is None else saved(source, entry, lambda _: None)
    plain = [_group(group, groups) for group in groups]
    inner = {
        "state": {"common_step": step},
        "param_groups": [{**group, "step": group.get("step", number)} for group in plain],
    }
    return {
        "state": {"common_step": step},
        "param_groups": plain,
        "optimizer": inner,
        "param_state_sharding_type": "fully_reshardable",
    }


def _group(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """A group in Megatron's words: one without weight decay has the others' with the factor 0."""
    options = _GROUP_DEFAULTS | {key: tuple(v) if key == "betas" else v for key, v in group.options.items()}
    if "wd_mult" not in options and "weight_decay" in options:
        most = max(float(one.options.get("weight_decay") or 0) for one in groups)
        own = float(group.options.get("weight_decay") or 0)
        options["wd_mult"] = own / most if most else 1.0
    options.setdefault("max_lr", options.get("lr"))
    options.setdefault("min_lr", None)
    return options
