"""Operations that move elements and compute nothing: they pass partial values of every kind.

A view keeps the row-major order. Both shapes fall into blocks of dimensions with the same elements; the first dimension
of a block (of more than one element) may be split on both sides where balanced splits of both cut at the same element:
if the two are equally long, or both are a multiple of the number of ranks.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from parallel.graph import Node
from parallel.signatures.signature import Signature
from parallel.signatures.table import PARTIALS, enter, in_step, may_split, moved, sized, splittable


def blocks(one: Sequence[int], other: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of two shapes that hold the same elements; those of size 1 are left out."""
    left = [dim for dim, size in enumerate(one) if size != 1]
    right = [dim for dim, size in enumerate(other) if size != 1]
    while left and right:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        a, b = one[ours[0]], other[theirs[0]]
        while a != b:
            if a < b:
                ours.append(left.pop(0))
                a *= one[ours[-1]]
            else:
                theirs.append(right.pop(0))
                b *= other[theirs[-1]]
        yield ours, theirs


def _passing(node: Node) -> Iterator[Signature]:
    if node.inputs[0].dtype == torch.bool:
        return
    for partial in PARTIALS:
        yield Signature((partial,) * len(node.inputs), (partial,) * len(node.outputs))


def _view(node: Node, parts: int) -> Iterator[Signature]:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if node.outputs[0].size:
        for ours, theirs in blocks(before, after):
            a, b = before[ours[0]], after[theirs[0]]
            if (a == b and may_split(a, parts)) or a % parts == b % parts == 0:
                yield moved(node, [ours[0]], [theirs[0]])
    yield from _passing(node)


def _permute(node: Node, parts: int) -> Iterator[Signature]:
    dims = node.args[1]
    assert isinstance(dims, tuple)
    for dim in splittable(node.inputs[0], parts):
        yield moved(node, [dim], [dims.index(dim)])
    yield from _passing(node)


def _expand(node: Node, parts: int) -> Iterator[Signature]:
    before = node.inputs[0].shape
    for dim in splittable(node.outputs[0], parts):
        own = dim - (len(node.outputs[0].shape) - len(before))
        yield moved(node, [own if own >= 0 and before[own] > 1 else None], [dim])
    yield from _passing(node)


def _anchor(node: Node, parts: int) -> Iterator[Signature]:
    """All but partial sums (`parallel.anchoring`); extremes are the same in whatever order they are taken."""
    yield from in_step(node, parts, range(len(node.inputs[0].shape)))
    yield from islice(_passing(node), 1, None)


def _complex(node: Node, parts: int) -> Iterator[Signature]:
    """Pairs of numbers as complex ones, and back: all dimensions but that of the pairs."""
    fewer = min(len(node.inputs[0].shape), len(node.outputs[0].shape))
    yield from in_step(node, parts, range(fewer))


def _along(node: Node, parts: int) -> Iterator[Signature]:
    """Slices, joins: all dimensions but the one that is cut or joined."""
    at = 1 if len(node.args) > 1 else None
    along = node.args[at] if at else 0
    assert isinstance(along, int)
    yield from in_step(node, parts, (dim for dim in range(len(node.inputs[0].shape)) if dim != along))
    yield from _passing(node)


def _pad(node: Node, parts: int) -> Iterator[Signature]:
    """Dimensions that are not padded; zeros may be padded to partial sums, anything cannot to extremes."""
    padding = node.args[1]
    assert isinstance(padding, tuple)
    rank = len(node.inputs[0].shape)
    padded = {rank - 1 - at // 2 for at, count in enumerate(padding) if count}
    yield from in_step(node, parts, (dim for dim in range(rank) if dim not in padded))
    if len(node.args) < 3 or not node.args[2]:
        yield from islice(_passing(node), 1)


def _roll(node: Node, parts: int) -> Iterator[Signature]:
    rank = len(node.inputs[0].shape)
    dims = node.args[2] if len(node.args) > 2 else ()
    assert isinstance(dims, tuple)
    rolled = {dim % rank for dim in dims if isinstance(dim, int)} or set(range(rank))
    yield from in_step(node, parts, (dim for dim in range(rank) if dim not in rolled))
    yield from _passing(node)


def _triangle(node: Node, parts: int) -> Iterator[Signature]:
    yield from in_step(node, parts, range(len(node.inputs[0].shape) - 2))
    yield from islice(_passing(node), 1)


enter("views", ["reshape.default", "view.default"], _view, sized(1))
enter("views", ["permute.default"], _permute)
enter("views", ["expand.default"], _expand, sized(1))
enter("views", ["alias.default"], _anchor)
enter("views", ["view_as_real.default", "view_as_complex.default"], _complex)
enter("views", ["slice.Tensor", "cat.default"], _along)
enter("views", ["constant_pad_nd.default"], _pad)
enter("views", ["tril.default", "triu.default"], _triangle)
enter("views", ["roll.default"], _roll)
