"""A part of a source: chosen tensors, weights alone, another dtype. Called by `checkpoint.convert`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.dtypes import FLOATS
from checkpoint.language import compiled
from checkpoint.lazy import from_numbers, to_numbers
from checkpoint.source import FP32, PARAM, WEIGHTS, Bytes, Entry, Group, Source, states_by_name
from collectives.errors import UsageError
from collectives.region import Region


@dataclass(frozen=True, slots=True)
class Selection:
    """Names to take and to leave out (regular expressions, found anywhere in the name), states, dtype of the weights.

    With `dtype` each floating weight is cast, the master where there is one, and moments stay as they are.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    weights_only: bool = False
    dtype: str | None = None

    def takes(self, name: str) -> bool:
        """Whether a parameter is taken."""
        wanted = not self.include or any(compiled(pattern).search(name) for pattern in self.include)
        return wanted and not any(compiled(pattern).search(name) for pattern in self.exclude)


class Selected:
    """A source with what a selection takes of another; casts as it reads."""

    def __init__(self, source: Source, selection: Selection, to: str) -> None:
        if selection.dtype is not None and selection.dtype not in FLOATS:
            raise UsageError(f"weights are cast to one of {', '.join(sorted(FLOATS))}, not {selection.dtype}")
        if selection.dtype not in (None, "F32") and to == "deepspeed-universal":
            raise UsageError("a universal checkpoint keeps fp32 masters, which are not cast; leave out --dtype")
        self.format = source.format
        self._source = source
        self._from: dict[str, Entry] = {}
        self.entries: dict[str, Entry] = {}
        weights_only = selection.weights_only or to == "hf"
        for name, states in states_by_name(source).items():
            if selection.takes(name):
                self._take(states, weights_only, selection.dtype)
        kept = {entry.name for entry in self.entries.values()}
        groups = () if weights_only else source.groups
        self.groups: Sequence[Group] = [
            Group(tuple(name for name in group.names if name in kept), group.options) for group in groups
        ]
        self.extras: Mapping[str, Any] = {
            **source.extras,
            "tied": [names for names in source.extras.get("tied", ()) if names and names[0] in kept],
        }

    def _take(self, states: Mapping[str, Entry], weights_only: bool, dtype: str | None) -> None:
        best = next((states[state] for state in WEIGHTS if state in states), None)
        for entry in states.values():
            weight = entry.state in WEIGHTS
            if weights_only and entry is not best:
                continue
            if not weight or dtype is None or entry.dtype not in FLOATS:
                self._put(entry, entry)
            elif entry is best:  # a cast master is a parameter, and the 16-bit one beside it is not kept too
                self._put(Entry(entry.name, _cast_state(entry, dtype), dtype, entry.shape), entry)

    def _put(self, entry: Entry, origin: Entry) -> None:
        self.entries[entry.key] = entry
        self._from[entry.key] = origin

    def read(self, key: str, box: Region) -> Bytes:
        """Return the bytes of a box of a tensor (`Source.read`)."""
        if key not in self.entries:
            raise UsageError(f"no tensor {key!r} was selected")
        entry, origin = self.entries[key], self._from[key]
        data = self._source.read(origin.key, box)
        return data if entry.dtype == origin.dtype else from_numbers(to_numbers(data, origin.dtype), entry.dtype)

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def _cast_state(entry: Entry, dtype: str) -> str:
    return PARAM if entry.state == FP32 and dtype != "F32" else entry.state


def check_patterns(patterns: Sequence[str], option: str) -> tuple[str, ...]:
    """Return patterns as a tuple. `UsageError`: one is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{option} {pattern!r} is no regular expression: {error}") from None
    return tuple(patterns)
