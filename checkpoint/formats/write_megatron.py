"""Writes Megatron-Core's `torch_dist` checkpoints, without torch or Megatron, for `dist_checkpointing.load`.

It takes sources whose names are those of Megatron's GPT (`decoder.layers.3.mlp.linear_fc1.weight`), from Megatron or
renamed by a spec; `megatron_keys` says what they are called in the folder. State of the optimizer is there for each of
Megatron's optimizers, at no cost, since several keys point to one copy:

- `optimizer.state.exp_avg.KEY` and `exp_avg_sq`, which all of them read;
- masters as `optimizer.state.param.KEY` (distributed optimizer, `fully_reshardable`) and
  `optimizer.state.fp32_param.KEY` (16-bit parameters without it);
- in `common.pt` groups and step, in the places where each looks.

Random states are not written, since they are of the ranks that had them: start with `--no-load-rng`. Nor is padding of
the vocabulary: Megatron fills with zeros what a folder has too few rows of.

`layout`: `tp=2,pp=2,ep=2` cuts tensors as these ranks ask for them, a file each; any other job loads them too. Called
by `checkpoint.convert`. Source: `megatron/core/{dist_checkpointing,optimizer}` of Megatron-Core 0.16.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint.convert import WriteOptions
from checkpoint.formats import megatron_keys
from checkpoint.formats.dcp_files import Item, Spread, Whole, metadata, write_files
from checkpoint.formats.megatron_common import common
from checkpoint.formats.output import Output
from checkpoint.source import FP32, PARAM, STEP, WEIGHTS, Entry, Source, states_by_name, weight_key
from checkpoint.torch_file import saved_box
from collectives.errors import UsageError
from collectives.region import Region, split

_AXES = ("pp", "ep", "tp")
_FILES = 4
"""Files without a layout: they can be written at once."""


@dataclass(slots=True)
class _Stack:
    """A tensor of the folder: parameters by their place in the leading dimensions (none: one, at the place `()`)."""

    key: str
    parts: dict[tuple[int, ...], Entry]

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(1 + max(numbers) for numbers in zip(*self.parts, strict=True))

    @property
    def first(self) -> Entry:
        return next(iter(self.parts.values()))

    @property
    def whole(self) -> Whole:
        return Whole(self.first.dtype, (*self.lead, *self.first.shape))

    @property
    def complete(self) -> bool:
        """Whether every place has a parameter, and all are alike."""
        alike = {(entry.dtype, entry.shape) for entry in self.parts.values()}
        return len(alike) == 1 and len(self.parts) == math.prod(self.lead)


def write(source: Source, folder: Path, options: WriteOptions, progress: Callable[[int], None]) -> None:
    """Write all of a source into an empty folder.

    Raises:
        UsageError: a name is not one of Megatron's, experts are missing, or the layout has other axes than tp, pp, ep.

    """
    sizes = _sizes(options.layout)
    stacks, aliases = _stacks(source)
    ranks = math.prod(sizes.values())
    spread = Spread(ranks if options.layout else _FILES)
    for stack in stacks.values():
        for item, rank in _items(source, stack, sizes, progress):
            spread.add(item, range(rank, rank + 1) if options.layout else range(_FILES))
    for item in _extra_states(stacks):
        spread.add(item, range(1))
    step = int(source.extras.get("iteration") or 0)
    inside = folder / f"iter_{step:07d}"
    inside.mkdir(exist_ok=True)
    output = Output(folder, options.journal, progress)
    places = write_files(
        output, {f"{inside.name}/__{n}_0.distcp": items for n, items in enumerate(spread.files) if items}
    )
    wholes = {key: stack.whole for key, stack in stacks.items()}
    (inside / ".metadata").write_bytes(metadata(wholes, places, None, aliases))
    output.write(f"{inside.name}/common.pt", [common(source, step)], "common")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (inside / "metadata.json").write_text(json.dumps(backends))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


def _sizes(layout: Mapping[str, int]) -> dict[str, int]:
    if strangers := sorted(set(layout) - set(_AXES) - {"dp", "cp"}):
        raise UsageError(f"a layout of Megatron has the axes tp, pp, ep (and dp, cp), not {', '.join(strangers)}")
    return {axis: layout.get(axis, 1) for axis in _AXES}


def _stacks(source: Source) -> tuple[dict[str, _Stack], dict[str, str]]:
    """The tensors of the folder by key, and the keys that point to another one's bytes."""
    tied = {other for _, *others in source.extras.get("tied", ()) for other in others}
    named = {name: states for name, states in states_by_name(source).items() if name not in tied}
    if strangers := [name for name in named if not megatron_keys.is_megatron(name)]:
        raise UsageError(
            f"{strangers[0]!r} ({len(strangers)} of {len(named)} names) is not what Megatron calls a parameter; give a "
            f"--spec that renames the source's parameters to Megatron's"
        )
    stacks = _stacked(source, named, alone=False)
    if not all(stack.complete for stack in stacks[0].values()):
        stacks = _stacked(source, named, alone=True)
        if uneven := [key for key, stack in stacks[0].items() if not stack.complete]:
            raise UsageError(f"the experts of {uneven[0]!r} are not all there, or differ in shape")
    return stacks


def _stacked(
    source: Source, named: Mapping[str, Mapping[str, Entry]], alone: bool
) -> tuple[dict[str, _Stack], dict[str, str]]:
    """See `_stacks`; `alone`: layers are not alike, so each has keys of its own."""
    stacks: dict[str, _Stack] = {}
    aliases: dict[str, str] = {}

    def add(key: str, place: tuple[int, ...], entry: Entry) -> None:
        stacks.setdefault(key, _Stack(key, {})).parts[place] = entry

    for name, states in named.items():
        found = megatron_keys.key_of(name)
        key = found.alone if alone else found.text
        layer = () if found.layer is None or alone else (found.layer,)
        place = layer if found.expert is None else (*layer, found.expert)
        weight = weight_key(source, name)
        if weight is not None:
            add(key, place, states.get(PARAM) or source.entries[weight])
        stepped = [state for state in states if state not in WEIGHTS]
        for state in stepped:
            if state != STEP:
                add(f"optimizer.state.{state}.{key}", place, states[state])
        if stepped and weight is not None:
            aliases[f"optimizer.state.fp32_param.{key}"] = f"optimizer.state.param.{key}"
            if PARAM in states and FP32 in states:
                add(f"optimizer.state.param.{key}", place, states[FP32])
            else:
                aliases |= {f"optimizer.state.{master}.{key}": key for master in ("param", "fp32_param")}
    return stacks, aliases


def _items(
    source: Source, stack: _Stack, sizes: Mapping[str, int], progress: Callable[[int], None]
) -> Iterator[tuple[Item, int]]:
    """The pieces of a tensor, and the rank in whose file each goes."""
    dim = megatron_keys.split_dim(stack.key)
    lead = stack.lead
    experts = ".experts." in stack.key
    for place, entry in stack.parts.items():
        pipeline = place[0] * sizes["pp"] // lead[0] if place and not (experts and len(place) == 1) else 0
        expert = place[-1] * sizes["ep"] // lead[-1] if experts else 0
        for tensor, box in enumerate(_boxes(entry.shape, dim, sizes["tp"])):
            piece = saved_box(source, entry, box, progress)
            start = (*place, *box.start)
            stop = (*(number + 1 for number in place), *box.stop)
            shaped = replace(piece, shape=(*(1 for _ in place), *piece.shape))
            rank = (pipeline * sizes["ep"] + expert) * sizes["tp"] + tensor
            yield Item(stack.key, shaped, Region(start, stop)), rank


def _boxes(shape: tuple[int, ...], dim: int | None, parts: int) -> Iterator[Region]:
    """A tensor in the parts of tensor parallel ranks."""
    if dim is None or dim >= len(shape) or parts > shape[dim]:
        yield Region.whole(shape)
        return
    for first, last in split(shape[dim], parts):
        start, stop = [0] * len(shape), list(shape)
        start[dim], stop[dim] = first, last
        yield Region(tuple(start), tuple(stop))


def _extra_states(stacks: Mapping[str, _Stack]) -> Iterator[Item]:
    """What Megatron's linear layers ask for beside their weights; it is empty without 8-bit floats."""
    for key, stack in stacks.items():
        name = megatron_keys.extra_state(key)
        if name is not None and not key.startswith("optimizer."):
            lead = stack.lead or (1,)
            for place in stack.parts:
                numbers = ".".join(map(str, place or (0,)))
                yield Item(f"{name}/shard_{numbers}_{'.'.join(map(str, lead))}", [None])
