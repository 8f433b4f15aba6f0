"""The table of all signatures: for each operation the rule that gives them, and how it runs on local shards.

The modules beside this one, one for each family of operations, fill it. Placements of `Flat` never occur:
operations run on boxes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from collectives.region import Region
from parallel.graph import Node, Value
from parallel.layout import Broadcast, Partial, Placement, Split
from parallel.signatures.signature import Signature

B = Broadcast()
P = Partial()
PMAX, PMIN = Partial("max"), Partial("min")
PARTIALS = (P, PMAX, PMIN)


@dataclass(frozen=True, slots=True)
class Shards:
    """Which box of each input and output of a node a rank holds."""

    inputs: tuple[Region, ...]
    outputs: tuple[Region, ...]


Run: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""Shards of a node's inputs to shards of its outputs."""
Rule: TypeAlias = Callable[[Node, int], Iterable[Signature]]
"""The signatures of a node along an axis of so many ranks, beside the one that is all `Broadcast`."""
Local: TypeAlias = Callable[[Node, Shards], Run]
"""How a node runs on the shards of one rank."""


def unchanged(node: Node, _shards: Shards) -> Run:
    """The same operation with the same arguments: all that most need."""
    return node.prepared()


def sized(argument: int) -> Local:
    """The same operation, with the shard's shape for the shape that is the argument of this number."""

    def local(node: Node, shards: Shards) -> Run:
        args = list(node.args)
        args[argument] = shards.outputs[0].shape
        return replace(node, args=tuple(args)).prepared()

    return local


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table holds of an operation. `family` is for readers of the report."""

    family: str
    rule: Rule
    local: Local = unchanged


TABLE: dict[str, Entry] = {}
"""By the name of the operation."""


def enter(family: str, names: Iterable[str], rule: Rule, local: Local = unchanged) -> None:
    """Add operations of one rule; names go without `aten.`."""
    for name in names:
        assert f"aten.{name}" not in TABLE, name
        TABLE[f"aten.{name}"] = Entry(family, rule, local)


def may_split(size: int, parts: int) -> bool:
    """Whether a dimension of this size is split over so many ranks: only if nobody is left without any of it.

    Uneven parts are allowed wherever balanced splits of all tensors stay in step.
    """
    return size >= parts > 1


def splittable(value: Value, parts: int) -> Iterator[int]:
    """The dimensions of a value that may be split."""
    return (dim for dim, size in enumerate(value.shape) if may_split(size, parts))


def moved(node: Node, inputs: Sequence[Placement | int | None], outputs: Sequence[Placement | int | None]) -> Signature:
    """A signature, written with numbers for splits of that dimension and None for `Broadcast`."""
    return Signature(tuple(map(_placement, inputs)), tuple(map(_placement, outputs)))


def _placement(what: Placement | int | None) -> Placement:
    return B if what is None else Split(what) if isinstance(what, int) else what


def in_step(node: Node, parts: int, dims: Iterable[int]) -> Iterator[Signature]:
    """Splits of each of `dims` in all inputs and outputs at once; tensors without the dimension are `Broadcast`."""
    for dim in dims:
        if may_split(node.inputs[0].shape[dim], parts):
            yield moved(node, [_has(value, dim) for value in node.inputs], [_has(value, dim) for value in node.outputs])


def _has(value: Value, dim: int) -> int | None:
    return dim if dim < len(value.shape) and value.shape[dim] > 1 else None


def whole(node: Node) -> Signature:
    """Every rank does all of it: holds for every operation."""
    return Signature((B,) * len(node.inputs), (B,) * len(node.outputs))


def linear(node: Node, *patterns: str) -> Iterator[Signature]:
    """Partial sums in, partial sums out.

    A pattern has a letter for each input, `p` where the operation is linear in all inputs with a `p` together, and `.`
    where every rank holds all; patterns of another length are for other calls of the operation.
    """
    for pattern in patterns:
        if len(pattern) == len(node.inputs):
            yield Signature(tuple(P if letter == "p" else B for letter in pattern), (P,) * len(node.outputs))
