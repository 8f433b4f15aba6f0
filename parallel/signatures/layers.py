"""Whole layers that torch runs as one kernel: norms, softmax, attention, convolutions, pooling; and their gradients."""

from collections.abc import Iterator

from parallel.graph import Node
from parallel.layout import Placement
from parallel.signatures.signature import Signature
from parallel.signatures.table import P, Run, Shards, enter, in_step, linear, may_split, moved, sized, splittable


def _normalized(node: Node) -> int:
    """How many dimensions are in front of those that a layer norm goes over."""
    shape = next(arg for arg in node.args if isinstance(arg, tuple) and arg and isinstance(arg[0], int))
    return len(node.inputs[0].shape) - len(shape)


def _layer_norm(node: Node, parts: int) -> Iterator[Signature]:
    """The dimensions before the norm."""
    for dim in splittable(node.inputs[0], parts):
        if dim < _normalized(node):
            yield moved(node, [dim] + [None] * (len(node.inputs) - 1), [dim] * len(node.outputs))


def _layer_norm_backward(node: Node, parts: int) -> Iterator[Signature]:
    """Gradients of gain and bias are sums over all that is before the norm."""
    front = _normalized(node)
    for dim in splittable(node.inputs[0], parts):
        if dim < front:
            inputs = [dim if len(value.shape) > front else None for value in node.inputs]
            yield moved(node, inputs, [dim if value.shape == node.inputs[0].shape else P for value in node.outputs])
    yield from linear(node, "p" + "." * (len(node.inputs) - 1))


def _dense(node: Node, _shards: Shards) -> Run:
    """On contiguous shards: torch 2.13 reads means and deviations as if they were."""
    return lambda tensors: node.call([tensor.contiguous() for tensor in tensors])


def _softmax(node: Node, parts: int) -> Iterator[Signature]:
    rank = len(node.inputs[0].shape)
    along = node.args[len(node.inputs)]
    assert isinstance(along, int)
    yield from in_step(node, parts, (dim for dim in range(rank) if dim != along % rank))
    yield from linear(node, "p.")  # of the backward: linear in the gradient


_ATTENTION_INPUTS = {"forward": "qkv", "backward": "gqkvol"}
"""In order: query, key, value, gradient of the output, output, logsumexp; then the mask, if there is one."""


def _attention(node: Node, parts: int) -> Iterator[Signature]:
    """Scaled dot product attention: query (B, H, T, E), key and value (B, G, S, E), H a multiple of G.

    Split may be: the batch; the heads, where each part of the query's has its own key's heads; the queries, if there
    is no causal mask (which counts from the first one); the features of the values.
    """
    backward = "backward" in node.op
    kinds = _ATTENTION_INPUTS["backward" if backward else "forward"]
    mask = node.inputs[len(kinds)] if len(node.inputs) > len(kinds) else None
    by_kind = dict(zip(kinds, node.inputs, strict=False))
    query, key = by_kind["q"], by_kind["k"]
    causal = bool(node.args[7 if backward else 4]) if len(node.args) > (7 if backward else 4) else False

    def signature(dim: int, whole: str, outputs: list[Placement | int | None]) -> Signature:
        inputs: list[Placement | int | None] = [None if kind in whole else dim for kind in kinds]
        if mask is not None:
            own = dim - (len(query.shape) - len(mask.shape))
            inputs.append(own if own >= 0 and mask.shape[own] > 1 else None)
        return moved(node, inputs, outputs)

    heads_in_step = query.shape[1] == key.shape[1] or key.shape[1] % parts == 0
    for dim in (0, 1):
        if may_split(min(query.shape[dim], key.shape[dim]), parts) and (dim == 0 or heads_in_step):
            yield signature(dim, "", [dim] * len(node.outputs))
    if may_split(query.shape[2], parts) and not causal:
        yield signature(2, "kv", [2, P, P] if backward else [2, 2])
    if backward:
        yield from linear(node, "p" + "." * (len(node.inputs) - 1))


def _convolution(node: Node, parts: int) -> Iterator[Signature]:
    """The batch; output channels; input channels, which leave partial sums. Groups of channels: the batch alone."""
    x, weight, *bias = node.inputs
    transposed, groups = node.args[6], node.args[8]
    if may_split(x.shape[0], parts):
        yield moved(node, [0, None, *([None] * len(bias))], [0])
    if groups == 1 and not transposed:
        if may_split(weight.shape[0], parts):
            yield moved(node, [None, 0, *([0] * len(bias))], [1])
        if may_split(weight.shape[1], parts) and not bias:
            yield moved(node, [1, 1], [P])
    yield from linear(node, "p.", ".p", "p.p")


def _convolution_backward(node: Node, parts: int) -> Iterator[Signature]:
    """Of gradient, input and weight, the gradients of input and weight (not of a bias)."""
    _, x, weight = node.inputs
    transposed, groups = node.args[7], node.args[9]
    asked = node.args[10]
    assert isinstance(asked, tuple)

    def signature(
        inputs: list[int | None], of_x: Placement | int | None, of_weight: Placement | int | None
    ) -> Signature:
        both = [(asked[0], of_x), (asked[1], of_weight)]
        return moved(node, inputs, [placement for wanted, placement in both if wanted])

    if asked[2]:
        return
    if may_split(x.shape[0], parts):
        yield signature([0, 0, None], 0, P)
    if groups == 1 and not transposed:
        if may_split(weight.shape[0], parts):
            yield signature([1, None, 0], P, 0)
        if may_split(weight.shape[1], parts):
            yield signature([None, 1, 1], 1, 1)
    yield from linear(node, "p..")
    if not asked[1]:
        yield from linear(node, "..p")
    if not asked[0]:
        yield from linear(node, ".p.")


def _pool(node: Node, parts: int) -> Iterator[Signature]:
    """Batch and channels. Averages are linear, and so are all gradients."""
    yield from in_step(node, parts, range(len(node.inputs[0].shape) - (3 if "3d" in node.op else 2)))
    if "avg" in node.op:
        yield from linear(node, "p", "p.")
        if "backward" in node.op:
            yield Signature((P, P), (P,))
    elif "backward" in node.op:
        yield from linear(node, "p..")


def _resample(node: Node, parts: int) -> Iterator[Signature]:
    """Batch and channels; between the elements all is linear."""
    yield from in_step(node, parts, range(2))
    yield from linear(node, "p")


def _resampled(node: Node, shards: Shards) -> Run:
    """The gradient, with the shard's shape for that of the input."""
    return sized(2)(node, shards) if "backward" in node.op else node.call


enter("norms", ["native_layer_norm.default"], _layer_norm)
enter("norms", ["native_layer_norm_backward.default"], _layer_norm_backward, _dense)
enter(
    "softmax",
    [
        "_softmax.default",
        "_safe_softmax.default",
        "_softmax_backward_data.default",
        "_log_softmax.default",
        "_log_softmax_backward_data.default",
    ],
    _softmax,
)
enter(
    "attention",
    [
        "_scaled_dot_product_flash_attention_for_cpu.default",
        "_scaled_dot_product_flash_attention_for_cpu_backward.default",
    ],
    _attention,
)
enter("convolution", ["convolution.default"], _convolution)
enter("convolution", ["convolution_backward.default"], _convolution_backward)
enter(
    "pooling",
    [
        "max_pool2d_with_indices.default",
        "max_pool2d_with_indices_backward.default",
        "avg_pool2d.default",
        "avg_pool2d_backward.default",
        "_adaptive_avg_pool2d.default",
        "_adaptive_avg_pool2d_backward.default",
        "avg_pool3d.default",
        "avg_pool3d_backward.default",
        "max_pool3d_with_indices.default",
        "max_pool3d_with_indices_backward.default",
    ],
    _pool,
)
enter(
    "pooling",
    [
        f"upsample_{kind}{end}.default"
        for kind in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")
        for end in ("", "_backward")
    ],
    _resample,
    _resampled,
)
