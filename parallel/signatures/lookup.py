"""Asking the table: the signatures of a node, which may meet on a mesh of two axes, and how a node runs on shards.

The planner asks for signatures, the executor for runs; the verifier proves both with the same code.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache

from collectives.errors import UsageError
from collectives.region import Region
from parallel.graph import Node, Value
from parallel.layout import Layout, Mesh, Partial, Placement, Split
from parallel.signatures.signature import Signature
from parallel.signatures.table import TABLE, Entry, Run, Shards, whole


class UnknownOperation(UserWarning):
    """An operation without signatures was met: every rank will do all of it."""


def signatures(node: Node, parts: int) -> tuple[Signature, ...]:
    """The signatures of a node along a mesh axis of `parts` ranks; the first is all `Broadcast`.

    A dimension is split only if each rank gets some of it, in parts that may be uneven where this is exact. An
    operation that is not in the table has the first signature alone, and `UnknownOperation` warns of it by name.
    Complex values are never partial.
    """
    return _signatures(node, parts, TABLE.get(node.op))


@lru_cache(maxsize=8192)
def _signatures(node: Node, parts: int, entry: Entry | None) -> tuple[Signature, ...]:
    """Remembered, because planners ask for the same nodes again and again."""
    if entry is None:
        warnings.warn(
            f"{node.op} (node {node.name}, module {node.module or 'of the step'}) has no signatures: every rank will "
            f"do all of it",
            UnknownOperation,
            stacklevel=3,
        )
        return (whole(node),)
    return tuple(dict.fromkeys((whole(node), *(one for one in entry.rule(node, parts) if not _of_complex(node, one)))))


def _of_complex(node: Node, one: Signature) -> bool:
    """Whether complex numbers would be partial: they have no largest, and collectives do not add them up."""
    placed = zip((*node.inputs, *node.outputs), (*one.inputs, *one.outputs), strict=True)
    return any(value.dtype.is_complex and isinstance(placement, Partial) for value, placement in placed)


def together(node: Node, chosen: Sequence[Signature], sizes: Sequence[int]) -> bool:
    """Whether signatures, one for each axis of a mesh of these sizes, hold at once.

    Each must be one of its axis. Axes that split one dimension need it to be splittable over their product, and a
    tensor's partial values must all combine in one way.
    """
    if any(one not in signatures(node, size) for one, size in zip(chosen, sizes, strict=True)):
        return False
    split_twice: set[int] = set()
    for placements in zip(*((*one.inputs, *one.outputs) for one in chosen), strict=True):
        if len({placement.op for placement in placements if isinstance(placement, Partial)}) > 1:
            return False
        for axis, placement in enumerate(placements):
            if isinstance(placement, Split) and placements.count(placement) > 1:
                split_twice.add(axis)
    total = 1
    for axis in split_twice:
        total *= sizes[axis]
    return all(chosen[axis] in signatures(node, total) for axis in split_twice)


def localize(node: Node, chosen: Sequence[Signature], mesh: Mesh, rank: int) -> Run:
    """How a rank runs a node on its shards, given a signature for each axis of the mesh.

    The result takes one shard for each of `node.inputs` and returns one for each of `node.outputs`. Arguments that are
    sizes become those of the shards, and indices are looked up among what the rank has.

    Raises:
        UsageError: a signature has not a placement for each input and output, or one of a dimension that there is not.

    """
    ends = [(len(one.inputs), len(one.outputs)) for one in chosen]
    if len(chosen) != len(mesh.axes) or any(end != (len(node.inputs), len(node.outputs)) for end in ends):
        raise UsageError(f"{node} needs a signature for each axis of mesh {mesh}, not {', '.join(map(str, chosen))}")

    def boxes(values: Sequence[Value], placements: Sequence[Sequence[Placement]]) -> tuple[Region, ...]:
        by_value = zip(values, zip(*placements, strict=True), strict=True) if placements else ((v, ()) for v in values)
        return tuple(Layout(mesh, along).shard(value.shape, rank).box for value, along in by_value)

    entry = TABLE.get(node.op)
    if entry is None:
        return node.prepared()
    inputs = boxes(node.inputs, [one.inputs for one in chosen])
    return entry.local(node, Shards(inputs, boxes(node.outputs, [one.outputs for one in chosen])))
