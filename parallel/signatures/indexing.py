"""Operations whose indices are data: embeddings, gather, scatter.

Where the dimension that is looked into is split, each rank runs on the indices that fall into its part: what it does
not have gives zero, so that the partial sums of all ranks are the result (a vocabulary split over ranks, as in
Megatron-LM, arXiv 1909.08053). Where the dimension that is written to is split, each rank writes its own part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parallel.graph import Node
from parallel.signatures.signature import Signature
from parallel.signatures.table import P, Run, Shards, enter, linear, may_split, moved, splittable


def _embedding(node: Node, parts: int) -> Iterator[Signature]:
    table, ids = node.inputs
    for dim in splittable(ids, parts):
        yield moved(node, [None, dim], [dim])
    if may_split(table.shape[0], parts):
        yield moved(node, [0, None], [P])
    if may_split(table.shape[1], parts):
        yield moved(node, [1, None], [len(ids.shape)])
    yield from linear(node, "p.")


def _embedding_backward(node: Node, parts: int) -> Iterator[Signature]:
    gradient, ids = node.inputs
    for dim in splittable(ids, parts):
        yield moved(node, [dim, dim], [P])
    rows, width = node.outputs[0].shape
    if may_split(rows, parts):
        yield moved(node, [None, None], [0])
    if may_split(width, parts):
        yield moved(node, [len(gradient.shape) - 1, None], [1])
    yield from linear(node, "p.")


def _shared(node: Node, parts: int, along: int) -> Iterator[int]:
    """The dimensions other than `along` that are equally long in all inputs and outputs."""
    for dim in splittable(node.inputs[0], parts):
        if dim != along and all(
            value.shape[dim] == node.inputs[0].shape[dim] for value in (*node.inputs, *node.outputs)
        ):
            yield dim


def _along(node: Node) -> int:
    dim = node.args[1]
    assert isinstance(dim, int)
    return dim % max(1, len(node.inputs[0].shape))


def _gather(node: Node, parts: int) -> Iterator[Signature]:
    source, index = node.inputs
    along = _along(node)
    for dim in _shared(node, parts, along):
        yield moved(node, [dim, dim], [dim])
    if may_split(source.shape[along], parts):
        yield moved(node, [along, None], [P])
    if may_split(index.shape[along], parts):
        yield moved(node, [None, along], [along])
    yield from linear(node, "p.")


def _scatter(node: Node, parts: int) -> Iterator[Signature]:
    into = node.inputs[0]
    along = _along(node)
    for dim in _shared(node, parts, along):
        yield moved(node, [dim] * len(node.inputs), [dim])
    if may_split(into.shape[along], parts):
        yield moved(node, [along] + [None] * (len(node.inputs) - 1), [along])
    if node.op == "aten.scatter_add.default":
        if may_split(node.inputs[1].shape[along], parts):
            yield moved(node, [P, along, along], [P])
        yield from linear(node, "p.p")
    elif node.op == "aten.scatter.src":
        yield from linear(node, "p.p")


def _indexed(node: Node) -> int | None:
    """The one dimension that an index list goes along; None if there are several indices, or one of truth values."""
    indices = node.args[1]
    assert isinstance(indices, tuple)
    given = [dim for dim, index in enumerate(indices) if index is not None]
    return given[0] if len(given) == 1 and node.inputs[1].dtype != torch.bool else None


def _index(node: Node, parts: int) -> Iterator[Signature]:
    """`x[:, index]`: what is not indexed, and the index itself, whose dimensions take the place of the indexed one."""
    along = _indexed(node)
    if along is None:
        return
    source, index = node.inputs
    wider = len(index.shape) - 1
    for dim in splittable(source, parts):
        if dim != along:
            yield moved(node, [dim, None], [dim if dim < along else dim + wider])
    for dim in splittable(index, parts):
        yield moved(node, [None, dim], [along + dim])
    yield from linear(node, "p.")


def _index_put(node: Node, parts: int) -> Iterator[Signature]:
    """`x[:, index] += values`: as above; if the index is split, each rank adds its own terms."""
    along = _indexed(node)
    if along is None:
        return
    into, index, values = node.inputs
    wider = len(index.shape) - 1
    if len(values.shape) != len(into.shape) + wider:  # broadcast values
        return
    for dim in splittable(into, parts):
        if dim != along:
            yield moved(node, [dim, None, dim if dim < along else dim + wider], [dim])
    if len(node.args) > 3 and node.args[3]:
        for dim in splittable(index, parts):
            yield moved(node, [P, dim, along + dim], [P])
        yield from linear(node, "p.p")


def _index_add(node: Node, parts: int) -> Iterator[Signature]:
    along = _along(node)
    into, index, _ = node.inputs
    for dim in splittable(into, parts):
        if dim != along:
            yield moved(node, [dim, None, dim], [dim])
    if may_split(index.size, parts):
        yield moved(node, [P, 0, along], [P])
    yield from linear(node, "p.p")


def _index_select(node: Node, parts: int) -> Iterator[Signature]:
    source, index = node.inputs
    along = _along(node)
    for dim in splittable(source, parts):
        yield moved(node, [dim, None], [P if dim == along else dim])
    if may_split(index.size, parts):
        yield moved(node, [None, 0], [along])
    yield from linear(node, "p.")


def _within(index: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which indices fall into a part, and all of them as that part counts (0 for those that do not)."""
    ours = (index >= start) & (index < stop)
    return ours, torch.where(ours, index - start, 0)


def _table_rows(node: Node, shards: Shards) -> Run:
    """Look up the rows that a rank has of an embedding; zeros for the others."""
    rows = shards.inputs[0]
    start, stop = rows.start[0], rows.stop[0]
    if stop - start == node.inputs[0].shape[0]:
        return node.call

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        table, ids = tensors
        ours, ids = _within(ids, start, stop)
        (found,) = node.call((table, ids))
        return (torch.where(ours.unsqueeze(-1), found, 0),)

    # The padding row counts in gradients alone, and its number would be another one here.
    node = replace(node, args=node.args[:2])
    return run


def _gradient_rows(node: Node, shards: Shards) -> Run:
    """Gradient of the rows that a rank has: those of others fall into one row more, which is cut off."""
    rows = shards.outputs[0]
    start, stop = rows.start[0], rows.stop[0]
    count, padding = node.args[2], node.args[3]
    assert isinstance(count, int) and isinstance(padding, int)
    if stop - start == count:
        return node.call
    padded = padding - start if start <= padding < stop else -1
    narrow = replace(node, args=(*node.args[:2], stop - start + 1, padded, *node.args[4:]))

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        gradient, ids = tensors
        ours = (ids >= start) & (ids < stop)
        (found,) = narrow.call((gradient, torch.where(ours, ids - start, stop - start)))
        return (found[:-1],)

    return run


def _gathered(node: Node, shards: Shards) -> Run:
    """Gather (or select) from the part that a rank has; zeros where another one has it."""
    along = _along(node)
    start, stop = shards.inputs[0].start[along], shards.inputs[0].stop[along]
    if stop - start == node.inputs[0].shape[along]:
        return node.call

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        source, index = tensors
        ours, index = _within(index, start, stop)
        (found,) = node.call((source, index))
        if ours.dim() != found.dim():  # index_select: one index for each slice
            ours = ours.reshape([-1 if dim == along else 1 for dim in range(found.dim())])
        return (torch.where(ours, found, 0),)

    return run


def _scattered(node: Node, shards: Shards) -> Run:
    """Scatter into the part that a rank has: what goes elsewhere is written into one slice more, which is cut off."""
    along = _along(node)
    start, stop = shards.inputs[0].start[along], shards.inputs[0].stop[along]
    if stop - start == node.inputs[0].shape[along]:
        return node.call

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        into, index, *source = tensors
        ours = (index >= start) & (index < stop)
        index = torch.where(ours, index - start, stop - start)
        spare = into.new_zeros([1 if dim == along else size for dim, size in enumerate(into.shape)])
        (wide,) = node.call((torch.cat((into, spare), along), index, *source))
        return (wide.narrow(along, 0, stop - start),)

    return run


enter("indexing", ["embedding.default"], _embedding, _table_rows)
enter("indexing", ["embedding_dense_backward.default"], _embedding_backward, _gradient_rows)
enter("indexing", ["gather.default"], _gather, _gathered)
enter("indexing", ["index_select.default"], _index_select, _gathered)
enter("indexing", ["scatter.value", "scatter.src", "scatter_add.default"], _scatter, _scattered)
enter("indexing", ["index.Tensor"], _index)
enter("indexing", ["index_put.default"], _index_put)
enter("indexing", ["index_add.default"], _index_add)
