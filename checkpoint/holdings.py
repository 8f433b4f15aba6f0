"""What each rank holds of a state that is to be saved or filled: told to all, and put together to one picture.

`checkpoint.saving` and `checkpoint.loading` gather a `Holding` of every rank; `merge` finds what the whole is, or who
contradicts whom. Pure functions of what was gathered, so that every rank comes to the same.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, TypeAlias

import msgspec

from checkpoint import nest
from checkpoint.nest import Json
from collectives.errors import LayoutMismatch, UsageError
from parallel.layout import Flat, Layout, Mesh, Partial, Shard, Split


@dataclass(frozen=True, slots=True)
class Sharded:
    """How a tensor lies over the ranks.

    Args:
        layout: its mesh names ranks of the communicator.
        shape: of the whole tensor; None: as follows from the shards, which is not to be known for a `Flat` one.

    """

    layout: Layout
    shape: tuple[int, ...] | None = None


Layouts: TypeAlias = Layout | Sharded | Mapping[str, Layout | Sharded] | None
"""One for all tensors, or by key: of a tensor, or of what it lies in ("optimizer/state"); the longest that fits counts.

None, or a tensor that nothing fits: whoever has the tensor has all of it.
"""


class HeldTensor(msgspec.Struct, frozen=True, array_like=True):
    """What a rank has of one tensor. `shape`: of the shard."""

    dtype: str
    shape: tuple[int, ...]
    layout: int | None
    """Index in `Holding.layouts`; None: all of it."""
    whole: tuple[int, ...] | None
    """Shape of the whole tensor, where it was given."""


class Holding(msgspec.Struct, frozen=True):
    """What a rank has."""

    state: Json
    tensors: dict[str, HeldTensor]
    layouts: tuple[dict[str, Any], ...]
    unused: tuple[str, ...] = ()
    """Names that have a layout and that nothing here fits; somebody else has to have it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks with the same elements of a tensor: `terms[i]` are replicas of the i-th term of a reduction.

    Where nothing is partial there is one term. Else the terms are those of an array of shape `extents`, row-major,
    which is reduced along its first axis by `ops[0]`, then along the next by `ops[1]`...
    """

    shard: Shard
    terms: tuple[tuple[int, ...], ...]
    ops: tuple[str, ...] = ()
    extents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Whole:
    """A tensor as all ranks together hold it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    shards: Mapping[int, Shard] = field(repr=False)
    """Of every rank of the mesh."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Who has the same elements, without the groups that have none."""
        found: dict[tuple[int, ...], Group] = {}
        for rank in self.layout.mesh.ranks:
            holders = self.layout.holders(rank)
            if holders not in found and self.shards[rank].size:
                found[holders] = self._group(rank, holders)
        return tuple(found.values())

    def _group(self, rank: int, holders: tuple[int, ...]) -> Group:
        axes = [n for n, placement in enumerate(self.layout.placements) if isinstance(placement, Partial)]
        extents = tuple(self.layout.mesh.shape[axis] for axis in axes)
        terms: dict[tuple[int, ...], list[int]] = {place: [] for place in product(*map(range, extents))}
        for holder in holders:
            place = self.layout.mesh.place(holder)
            terms[tuple(place[axis] for axis in axes)].append(holder)
        return Group(self.shards[rank], tuple(map(tuple, terms.values())), self.shards[rank].partial, extents)


def describe(state: Json, tensors: Mapping[str, tuple[str, tuple[int, ...]]], layouts: Layouts) -> Holding:
    """What this rank has: `tensors` are dtype and shape by key."""
    choose = chooser(layouts)
    numbers: dict[Layout, int] = {}
    held: dict[str, HeldTensor] = {}
    for key, (dtype, shape) in tensors.items():
        chosen = choose(key)
        number = None if chosen is None else numbers.setdefault(chosen.layout, len(numbers))
        held[key] = HeldTensor(dtype, shape, number, None if chosen is None else chosen.shape)
    return Holding(state, held, tuple(layout.to_json() for layout in numbers), unused(layouts, tensors))


def unused(layouts: Layouts, keys: Iterable[str]) -> tuple[str, ...]:
    """The names of layouts that none of the keys fits."""
    if not isinstance(layouts, Mapping):
        return ()
    fitting = {""}
    for key in keys:
        parts = key.split("/")
        fitting.update("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return tuple(name for name in layouts if name not in fitting)


def refuse_unused(names: Iterable[str], keys: Iterable[str]) -> None:
    """Raise `LayoutMismatch` for layouts of what no rank has: misspelt, their tensors would pass for replicas."""
    if idle := unused(dict.fromkeys(names, Layout.single()), keys):
        raise mismatch(
            "layouts are named for what no rank has; correct the names, or leave them out",
            missing=dict.fromkeys(idle, ""),
        )


def merge(holdings: Mapping[int, Holding]) -> dict[str, Whole]:
    """The tensors that the ranks have together, by key, in the order in which the ranks name them.

    Raises:
        LayoutMismatch: ranks contradict each other, or have other shards than their layout says; `mismatched` has all.

    """
    keys = dict.fromkeys(key for holding in holdings.values() for key in holding.tensors)
    refuse_unused((name for holding in holdings.values() for name in holding.unused), keys)
    parsed = {rank: [Layout.from_json(data) for data in holding.layouts] for rank, holding in holdings.items()}
    found: dict[str, Whole] = {}
    wrong: dict[str, str] = {}
    for key in keys:
        held = {rank: holding.tensors[key] for rank, holding in holdings.items() if key in holding.tensors}
        layouts = {rank: parsed[rank][one.layout] for rank, one in held.items() if one.layout is not None}
        try:
            found[key] = _whole(key, held, layouts, holdings)
        except (UsageError, LayoutMismatch) as error:
            wrong[key] = str(error)
    if wrong:
        raise mismatch("the tensors do not fit their layouts", mismatched=wrong)
    return found


def mismatch(
    what: str,
    missing: Mapping[str, str] | None = None,
    unexpected: Mapping[str, str] | None = None,
    mismatched: Mapping[str, str] | None = None,
) -> LayoutMismatch:
    """The error that lists names, each with what is to be said of it."""
    kinds = {"missing": missing or {}, "unexpected": unexpected or {}, "mismatched": mismatched or {}}
    lines = [
        f"  {kind}: {key}" + (f" ({why})" if why else "")
        for kind, names in kinds.items()
        for key, why in list(names.items())[:_SHOWN]
    ]
    more = sum(len(names) - _SHOWN for names in kinds.values() if len(names) > _SHOWN)
    text = "\n".join([f"{what}:", *lines, *([f"  and {more} more"] if more else [])])
    return LayoutMismatch(text, *(tuple(names) for names in kinds.values()))


def mismatched(why: str) -> LayoutMismatch:
    """What is said of one tensor; `mismatch` lists several."""
    return LayoutMismatch(why)


_SHOWN = 20
"""Names of each kind that a message lists; the error has all."""


def merge_states(states: Mapping[int, Json]) -> Json:
    """The nests of all ranks in one: dicts by the union of their keys, all else equal.

    Raises:
        LayoutMismatch: ranks have different values in one place.

    """
    wrong: dict[str, str] = {}
    ranks = list(states)
    merged = states[ranks[0]]
    for rank in ranks[1:]:
        merged = _united(merged, states[rank], "", rank, wrong)
    if wrong:
        raise mismatch(
            "ranks have different values in one place; make them equal, or keep those of each rank in a dict by rank",
            mismatched=wrong,
        )
    return merged


def _united(one: Json, other: Json, path: str, rank: int, wrong: dict[str, str]) -> Json:
    mine, theirs = nest.items_of(one), nest.items_of(other)
    if mine is None or theirs is None:
        if one != other or type(one) is not type(other):
            wrong.setdefault(path, f"rank {rank} has another than the ranks before it")
        return one
    united = {
        key: _united(mine[key], theirs[key], nest.join(path, key), rank, wrong)
        if key in mine and key in theirs
        else mine.get(key, theirs.get(key))
        for key in dict.fromkeys([*mine, *theirs])
    }
    return nest.dict_of(united)


def chooser(layouts: Layouts) -> Callable[[str], Sharded | None]:
    """How the tensor of a key lies; None: whoever has it has all of it."""
    if layouts is None:
        return lambda _: None
    if not isinstance(layouts, Mapping):
        one = _as_sharded(layouts)
        return lambda _: one
    table = {key: _as_sharded(value) for key, value in layouts.items()}

    def choose(key: str) -> Sharded | None:
        parts = key.split("/")
        for count in range(len(parts), -1, -1):
            if (found := table.get("/".join(parts[:count]))) is not None:
                return found
        return None

    return choose


def _as_sharded(value: Layout | Sharded) -> Sharded:
    return value if isinstance(value, Sharded) else Sharded(value)


def _whole(key: str, held: Mapping[int, HeldTensor], layouts: Mapping[int, Layout], present: Container[int]) -> Whole:
    """A tensor, as the ranks that are `present` say; one that is not was lost, and its layout says what it had."""
    first = next(iter(held))
    for rank, one in held.items():
        for what in ("dtype", "whole"):
            if getattr(one, what) != getattr(held[first], what):
                raise LayoutMismatch(
                    f"{'dtype' if what == 'dtype' else 'whole shape'} {getattr(held[first], what)} on rank {first}, "
                    f"{getattr(one, what)} on rank {rank}"
                )
        if layouts.get(rank) != layouts.get(first):
            raise LayoutMismatch(f"layout {layouts.get(first)} on rank {first}, {layouts.get(rank)} on rank {rank}")
    layout = layouts.get(first) or Layout.replicated(Mesh((("replica", len(held)),), tuple(held)))
    missing = sorted(set(layout.mesh.ranks) - set(held))
    if idle := [rank for rank in missing if rank in present]:
        raise LayoutMismatch(f"rank {idle[0]} is on mesh {layout.mesh} and does not have it")
    if strangers := sorted(set(held) - set(layout.mesh.ranks)):
        raise LayoutMismatch(f"rank {strangers[0]} has it and is not on mesh {layout.mesh}")
    shape = held[first].whole
    if shape is None:
        shape = infer_shape(layout, {rank: one.shape for rank, one in held.items()})
    shards = {rank: layout.shard(shape, rank) for rank in layout.mesh.ranks}
    for rank, shard in shards.items():
        if rank in held and not fits(held[rank].shape, shard):
            raise LayoutMismatch(
                f"of shape {shape} by {layout} rank {rank} has {shard.shape}, its tensor is {held[rank].shape}"
            )
    return Whole(key, held[first].dtype, shape, layout, shards)


def fits(shape: tuple[int, ...], shard: Shard) -> bool:
    """Whether a tensor of this shape can hold the shard: by its shape, or flat."""
    return shape == shard.shape or (len(shape) == 1 and shape[0] == shard.size and shard.box.shape != shape)


def infer_shape(layout: Layout, shapes: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a whole tensor from those of its shards, or of some of them.

    Raises:
        UsageError: it is cut flat, so that it cannot be known; shards differ in their number of dimensions; or too few
            of them are there.

    """
    if any(isinstance(placement, Flat) for placement in layout.placements):
        raise UsageError(f"layout {layout} cuts it flat; give the whole shape: Sharded(layout, shape)")
    first = next(iter(shapes.values()))
    if any(len(shape) != len(first) for shape in shapes.values()):
        raise UsageError("its shards differ in their number of dimensions")
    layout.check(first)
    return tuple(_extent(layout, dim, shapes) for dim in range(len(first)))


def _extent(layout: Layout, dim: int, shapes: Mapping[int, tuple[int, ...]]) -> int:
    """Extent of the whole along a dimension: the sum along all axes that split it, wherever those are all there."""
    mesh = layout.mesh
    splits = [isinstance(placement, Split) and placement.dim == dim for placement in layout.placements]
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank in mesh.ranks:
        place = mesh.place(rank)
        fixed = tuple(at for at, along in zip(place, splits, strict=True) if not along)
        lines.setdefault(fixed, []).append(rank)
    for line in lines.values():
        if all(rank in shapes for rank in line):
            return sum(shapes[rank][dim] for rank in line)
    raise UsageError("ranks were lost, so that its whole shape is not known; give it: Sharded(layout, shape)")
