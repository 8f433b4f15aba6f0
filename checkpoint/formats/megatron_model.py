"""What both of Megatron's checkpoint layouts share: settings, names, groups of the optimizer, and its flat buffers.

Megatron keeps neither names in its parameter groups nor addresses in the distributed optimizer's buffers. Both follow
from rules of its code, which are applied here and checked against shapes and sizes: `optimizer/__init__.py` (biases and
vectors have no weight decay; experts have groups of their own) and `distributed/param_and_grad_buffer.py` (parameters
in reverse order, each at a multiple of 64 elements, in buckets) of Megatron-Core 0.16. Used by `read_megatron_dist` and
`read_megatron_legacy`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.language import PatternMissing, Spec, Vocabulary
from checkpoint.lazy import PiecesMissing
from checkpoint.source import Group
from checkpoint.torch_load import TorchFile
from checkpoint.unpickle import Opaque

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = re.compile(r"((?:.*\.)?layers\.)(\d+)(\..*)")
EXPERT = re.compile(r"(.*\.mlp\.experts\.(?:local_experts|experts)\.)(\d+)(\..*)")
_ALIGNED = 64


def settings_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the job that wrote a checkpoint; empty where it kept none."""
    args = value.get("args")
    if isinstance(args, Opaque) and isinstance(args.state, dict):
        return args.state
    return args if isinstance(args, dict) else {}


def spec_of(args: Mapping[str, Any], user: Spec | None) -> Spec:
    """Megatron's patterns with the job's settings; the user's come first."""
    built_in = Spec.built_in("megatron")
    spec = user_patterns(user).over(built_in) if user else built_in
    numbers = {key: value for key, value in args.items() if type(value) is int}
    numbers["gated"] = int(bool(args.get("swiglu") or args.get("gated_linear_unit")))
    spec = spec.with_settings(numbers)
    rows = args.get("vocab_size")
    if type(rows) is int and rows > 0:
        padded = Vocabulary(r"(.*\.)?(word_embeddings|output_layer)\.weight", rows)
        spec = Spec(spec.patterns, (*spec.vocabularies, padded), spec.names, spec.default, spec.settings, spec.title)
    return spec


def user_patterns(spec: Spec) -> Spec:
    """A user's spec without its names, which are applied to what the reader gives."""
    return Spec(spec.patterns, spec.vocabularies, (), spec.default, spec.settings, spec.title)


def own_name(spec: Spec, name: str) -> str:
    """What Megatron's own modules call a parameter of a folder or of a Transformer Engine model."""
    found = spec.targets(name)
    return found[1][0] if found else name


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one expert, and so to the optimizer of experts."""
    return EXPERT.fullmatch(name) is not None


def find_groups(value: Any) -> Iterator[Mapping[str, Any]]:
    """The parameter groups of all optimizers in a state, in order."""
    if isinstance(value, dict):
        if isinstance(value.get("param_groups"), list):
            yield from value["param_groups"]
        else:
            for item in value.values():
                yield from find_groups(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_groups(item)


def grouped(options: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Names of the parameters of each group, by Megatron's rules.

    Raises:
        PatternMissing: two groups cannot be told apart.

    """
    found: list[list[str]] = [[] for _ in options]
    for name, shape in shapes.items():
        decays = not (name.endswith(".bias") or len(shape) == 1)
        output = name in (EMBEDDING, OUTPUT)
        rules = {
            "is_expert_parallel": is_expert(name),
            "wd_mult": 1.0 if decays else 0.0,
            "is_decoupled_lr": output,
        }
        left = list(range(len(options)))
        for key, wanted in rules.items():
            fitting = [index for index in left if float(options[index].get(key, wanted) or 0) == float(wanted)]
            left = fitting or left
        if len(left) > 1:
            left = [left[0]] if all(_same(options[left[0]], options[index]) for index in left) else left
        if len(left) != 1:
            raise PatternMissing(
                f"{name}: Megatron keeps no names in its parameter groups, and its rules do not tell which of groups "
                f"{left} it is in; leave out the optimizer with --weights-only"
            )
        found[left[0]].append(name)
    return found


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def groups_of(options: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], file: TorchFile) -> list[Group]:
    """Groups with their hyperparameters as JSON."""
    made = []
    for option, members in zip(options, names, strict=True):
        kept = {key: value for key, value in option.items() if key not in ("params", "step")}
        made.append(Group(tuple(members), file.json(kept, "param_groups")[0]))
    return made


@dataclass(frozen=True, slots=True)
class Address:
    """Where a parameter lies in a bucket of a flat buffer: elements `[start, stop)`."""

    bucket: int
    start: int
    stop: int


def buffer_layout(
    params: Sequence[tuple[str, int, bool]], *, sizes: Sequence[int] | None = None, bucket_size: int | None = None
) -> tuple[dict[str, Address], list[int]]:
    """Lay out a buffer of the distributed optimizer as Megatron does.

    Args:
        params: name, elements, and whether it is an embedding that pipeline stages share, in the order of the model.
        sizes: elements of each bucket without the padding at its end, where the checkpoint tells them.
        bucket_size: elements at which a bucket is full, where it does not; None: one bucket.

    Returns:
        The address of each parameter, and the sizes of the buckets without padding.

    Raises:
        PiecesMissing: the parameters do not fit the sizes.

    """
    found: dict[str, Address] = {}
    made: list[int] = []
    at, filled = 0, False  # within the bucket: what the padding of earlier ones adds is a multiple of the alignment

    def close(end: int) -> None:
        nonlocal at, filled
        made.append(end)
        at, filled = 0, False

    for name, numel, shared in reversed(params):
        start = -(-at // _ALIGNED) * _ALIGNED
        full = sizes is not None and len(made) < len(sizes) and start == sizes[len(made)]
        if filled and (full or (sizes is None and shared)):
            close(start)
            start = 0
        found[name] = Address(len(made), start, start + numel)
        at, filled = start + numel, True
        if sizes is not None:
            if len(made) >= len(sizes) or at > sizes[len(made)]:
                raise PiecesMissing(
                    f"{name} does not fit into bucket {len(made)} of the distributed optimizer, whose buckets have "
                    f"{sizes} elements; the order of parameters is not that of Megatron-Core's GPT"
                )
            if at == sizes[len(made)]:
                close(at)
        elif shared or (bucket_size is not None and at >= bucket_size):
            close(at)
    if filled:
        close(at)
    if sizes is not None and list(sizes) != made:
        raise PiecesMissing(f"the distributed optimizer's buckets have {list(sizes)} elements, its parameters {made}")
    return found, made


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return math.prod(shape)
