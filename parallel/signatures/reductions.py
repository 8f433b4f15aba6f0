"""Sums, extremes and scans over dimensions."""

from collections.abc import Iterator

import torch

from parallel.graph import Node
from parallel.layout import Partial, Placement
from parallel.signatures.signature import Signature
from parallel.signatures.table import PMAX, PMIN, P, enter, linear, moved, splittable

REDUCED: dict[str, Partial | None] = {
    "sum.dim_IntList": P,
    "amax.default": PMAX,
    "amin.default": PMIN,
    "prod.dim_int": None,
    "argmax.default": None,
    "argmin.default": None,
    "max.dim": None,
    "min.dim": None,
    "median.dim": None,
    "any.dim": None,
    "all.dim": None,
}
"""What a reduction over a split dimension leaves: values that combine in this way, or nothing of use."""

SCANNED = (
    "cumsum.default",
    "cumprod.default",
    "topk.default",
    "sort.default",
    "sort.stable",
    "flip.default",
    "cummax.default",
    "cummin.default",
    "logcumsumexp.default",
)
"""Keep all dimensions; along the one (or those) of their argument each element depends on others."""


def _dims(node: Node, at: int = 1) -> tuple[int, ...]:
    """The dimensions that an argument names; all where it names none."""
    rank = len(node.inputs[0].shape)
    named = node.args[at] if len(node.args) > at else None
    if named is None or named == ():
        return tuple(range(rank))
    dims = named if isinstance(named, tuple) else (named,)
    return tuple(dim % rank for dim in dims if isinstance(dim, int))


def _reduce(node: Node, parts: int) -> Iterator[Signature]:
    combined = REDUCED[node.op.removeprefix("aten.")]
    over = _dims(node)
    kept = len(node.inputs[0].shape) == len(node.outputs[0].shape)
    for dim in splittable(node.inputs[0], parts):
        if dim not in over:
            after: Placement | int = dim if kept else dim - sum(gone < dim for gone in over)
            yield moved(node, [dim], [after] * len(node.outputs))
        elif combined is not None:
            yield moved(node, [dim], [combined])
    if combined is not None and node.inputs[0].dtype != torch.bool:
        yield Signature((combined,), (combined,))


_SCANNED_DIM = {"topk.default": 2, "sort.stable": 2}


def _scan(node: Node, parts: int) -> Iterator[Signature]:
    name = node.op.removeprefix("aten.")
    default = {"topk.default": -1, "sort.default": -1, "sort.stable": -1}
    at = _SCANNED_DIM.get(name, 1)
    rank = len(node.inputs[0].shape)
    given = dict(node.kwargs).get("dim", default.get(name, 0))
    along = _dims(node, at) if len(node.args) > at or not isinstance(given, int) else (given % rank,)
    for dim in splittable(node.inputs[0], parts):
        if dim not in along:
            yield moved(node, [dim], [dim] * len(node.outputs))
    if name in {"cumsum.default", "flip.default"}:
        yield from linear(node, "p")


enter("reductions", REDUCED, _reduce)
enter("scans", SCANNED, _scan)
