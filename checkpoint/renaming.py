"""A source under other names: parameters renamed and fused ones taken apart, as a spec says.

All states of a parameter go the same way, moments as well as weights, and so do the parameter groups. Called by
`checkpoint.convert` for specs that have names, such as `megatron-gpt-to-hf-llama`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.dtypes import itemsize
from checkpoint.language import PatternMissing, Rename, Spec, along, evaluate
from checkpoint.lazy import Lazy, Part, PiecesMissing, Placed
from checkpoint.source import Bytes, Entry, Group, Source, states_by_name
from collectives.errors import UsageError
from collectives.region import Region


class Renamed:
    """Another source by the names of a spec; parameters that no rule names keep their own.

    Raises:
        PatternMissing: two rules claim a parameter, or two parameters get one name.
        PiecesMissing: parts do not make up a fused parameter.

    """

    def __init__(self, source: Source, spec: Spec) -> None:
        self.format = source.format
        self._source = source
        self._tensors: dict[str, Lazy] = {}
        self.entries: dict[str, Entry] = {}
        settings = settings_of(source.extras)
        self.spec = spec.with_settings(settings)
        named: dict[str, tuple[str, ...]] = {}
        ties: list[list[str]] = []
        for name, states in states_by_name(source).items():
            if (owner := self.spec.owner(name)) is not None:
                ties.append([owner, name])
                continue
            found = self.spec.targets(name)
            named[name] = (name,) if found is None else found[1]
            for entry in states.values():
                self._take(entry, named[name], found[0] if found else None)
        self.groups: Sequence[Group] = [
            Group(tuple(new for name in group.names for new in named.get(name, (name,))), group.options)
            for group in source.groups
        ]
        ties += _ties(source)
        rows = [[new for name in names for new in named.get(name, _first(self.spec, name))] for names in ties]
        self.extras: Mapping[str, Any] = {**source.extras, "tied": [row for row in rows if len(row) > 1]}

    def _take(self, entry: Entry, names: tuple[str, ...], rule: Rename | None) -> None:
        whole = _Read(self._source, entry)
        tensors = [whole] if len(names) == 1 else self._parts(entry, whole, rule, len(names))
        for name, tensor in zip(names, tensors, strict=True):
            made = Entry(name, entry.state, entry.dtype, tensor.shape)
            if made.key in self.entries:
                raise PatternMissing(f"{entry.name}: spec {self.spec.title} calls it {name}, as another one")
            self.entries[made.key] = made
            self._tensors[made.key] = tensor

    def _parts(self, entry: Entry, whole: Lazy, rule: Rename | None, count: int) -> Sequence[Lazy]:
        """A fused parameter taken apart; a state of no dimensions (its step) goes to every part."""
        if rule is None or not count:
            return []
        if not entry.shape:
            return [whole] * count
        settings = self.spec.settings
        sizes = [evaluate(part, settings, rule.match) for part in rule.parts]
        groups = evaluate(rule.groups, settings, rule.match)
        if len(sizes) != count or rule.dim >= len(entry.shape) or sum(sizes) * groups != entry.shape[rule.dim]:
            raise PiecesMissing(
                f"{entry.name}: {groups} groups of parts of {sizes} along dimension {rule.dim} do not make up its "
                f"shape {entry.shape}; look at the settings of {self.spec.title}"
            )
        return [self._gathered(entry, whole, rule.dim, sizes, groups, index) for index in range(count)]

    def _gathered(self, entry: Entry, whole: Lazy, dim: int, sizes: Sequence[int], groups: int, index: int) -> Lazy:
        """One part: its pieces of all groups, one behind the other."""
        size, period, first = sizes[index], sum(sizes), sum(sizes[:index])
        shape = (*entry.shape[:dim], size * groups, *entry.shape[dim + 1 :])
        parts = [
            Part(
                along(shape, dim, group * size, (group + 1) * size),
                whole,
                tuple(group * period + first if d == dim else 0 for d in range(len(shape))),
            )
            for group in range(groups)
        ]
        return Placed(entry.name, shape, parts)

    def read(self, key: str, box: Region) -> Bytes:
        """Return the bytes of a box of a tensor (`Source.read`)."""
        if key not in self._tensors:
            raise UsageError(f"this checkpoint has no tensor {key!r}")
        return self._tensors[key].read(box)

    def close(self) -> None:
        """Close the source."""
        self._source.close()


class _Read(Lazy):
    """A tensor of a source, as a lazy one."""

    def __init__(self, source: Source, entry: Entry) -> None:
        self._source, self._key, self.dtype, self.shape = source, entry.key, entry.dtype, entry.shape

    def fill(self, box: Region, out: Any) -> None:
        """Write the elements of a box into `out`."""
        data = self._source.read(self._key, box)
        out[...] = data.view(out.dtype).reshape(box.shape) if itemsize(self.dtype) > 1 else data.reshape(box.shape)

    def read(self, box: Region) -> Bytes:
        """Return the bytes of a box."""
        return self._source.read(self._key, box)


def settings_of(extras: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers that a spec may compute with: the settings of the job that wrote the checkpoint.

    Megatron's `num_query_groups` and `kv_channels` are filled in where its settings leave them to their defaults.
    """
    args = extras.get("args")
    found = {k: v for k, v in args.items() if type(v) is int} if isinstance(args, dict) else {}
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if heads:
        found.setdefault("num_query_groups", heads)
        if hidden and math.gcd(hidden, heads):
            found.setdefault("kv_channels", hidden // heads)
    return found


def _ties(source: Source) -> list[list[str]]:
    return [list(names) for names in source.extras.get("tied", ())]


def _first(spec: Spec, name: str) -> tuple[str, ...]:
    """The new name of a tensor that has no entries of its own."""
    found = spec.targets(name)
    return found[1] if found else (name,)
