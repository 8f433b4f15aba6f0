"""Operations that treat each element alone, with broadcasting of dimensions that are 1 or missing."""

from collections.abc import Iterator

import torch

from parallel.graph import Node, Value
from parallel.layout import Placement
from parallel.signatures.signature import Signature
from parallel.signatures.table import PMAX, PMIN, B, P, enter, linear, may_split, moved

LINEAR: dict[str, tuple[str, ...]] = {
    "add.Tensor": ("pp",),
    "sub.Tensor": ("pp",),
    "neg.default": ("p",),
    "mul.Scalar": ("p",),
    "div.Scalar": ("p",),
    "mul.Tensor": ("p.", ".p", "p"),
    "div.Tensor": ("p.", "p"),
    "lerp.Scalar": ("pp",),
    "addcmul.default": ("pp.", "p.p"),
    "addcdiv.default": ("pp.",),
    "where.self": (".pp",),
    "_to_copy.default": ("p",),
    "gelu_backward.default": ("p.",),
    "silu_backward.default": ("p.",),
    "threshold_backward.default": ("p.",),
    "tanh_backward.default": ("p.",),
    "sigmoid_backward.default": ("p.",),
    "hardtanh_backward.default": ("p.",),
    "leaky_relu_backward.default": ("p.",),
    "elu_backward.default": ("p.",),
    "hardswish_backward.default": ("p.",),
    "softplus_backward.default": ("p.",),
    "hardsigmoid_backward.default": ("p.",),
    "softshrink_backward.default": ("p.",),
    "logit_backward.default": ("p.",),
    "native_dropout_backward.default": ("p.",),
    "lerp.Tensor": ("pp.",),
    "masked_fill.Tensor": ("p.p",),
}
"""In which inputs each is linear, as `linear` reads it."""

INCREASING = (
    "add.Scalar", "ceil.default", "clamp.default", "clamp_max.default", "clamp_min.default", "erf.default",
    "exp.default", "exp2.default", "expm1.default", "floor.default", "hardtanh.default", "leaky_relu.default",
    "relu.default", "round.default", "sgn.default", "sigmoid.default", "sign.default", "softplus.default",
    "sub.Scalar", "tanh.default", "trunc.default",
)  # fmt: skip
"""Of one tensor, growing with it: the largest input gives the largest output. Not roots and logarithms: what is not the
largest may be negative, and the largest of NaN and a number is NaN."""

OTHERS = (
    "abs.default", "acos.default", "asin.default", "atan.default", "atan2.default", "bitwise_and.Scalar",
    "bitwise_and.Tensor", "bitwise_not.default", "bitwise_or.Tensor", "clamp.Tensor", "clamp_min.Tensor",
    "complex.default", "conj_physical.default", "cos.default", "cosh.default", "div.Tensor_mode", "elu.default",
    "eq.Scalar", "eq.Tensor", "erfc.default", "erfinv.default", "floor_divide.default", "fmod.Scalar", "frac.default",
    "ge.Scalar", "ge.Tensor", "gelu.default", "gt.Scalar", "gt.Tensor", "hardshrink.default", "hardsigmoid.default",
    "hardswish.default", "hypot.default", "isinf.default", "isnan.default", "le.Scalar", "le.Tensor",
    "lgamma.default", "log.default", "log10.default", "log1p.default", "log2.default", "logaddexp.default",
    "logical_and.default", "logical_not.default", "logical_or.default", "lt.Scalar", "lt.Tensor",
    "masked_fill.Scalar", "maximum.default", "minimum.default", "mish.default", "nan_to_num.default", "ne.Scalar",
    "ne.Tensor", "polar.default", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal.default",
    "remainder.Scalar", "remainder.Tensor", "rsqrt.default", "rsub.Scalar", "silu.default", "sin.default",
    "sinh.default", "softshrink.default", "sqrt.default", "square.default", "tan.default", "threshold.default",
    "where.Scalar", "where.ScalarOther", "where.ScalarSelf", "xlogy.Tensor",
)  # fmt: skip


def _splits(node: Node, parts: int) -> Iterator[Signature]:
    """Each dimension of the result, in the inputs where it is not broadcast."""
    shape = node.outputs[0].shape
    for dim, size in enumerate(shape):
        if may_split(size, parts):
            inputs = [_aligned(value, dim, len(shape)) for value in node.inputs]
            yield moved(node, inputs, [dim] * len(node.outputs))


def _aligned(value: Value, dim: int, rank: int) -> int | None:
    """The dimension of an input that dimension `dim` of the result comes from."""
    own = dim - (rank - len(value.shape))
    return own if own >= 0 and value.shape[own] > 1 else None


def _sums(node: Node, patterns: tuple[str, ...]) -> Iterator[Signature]:
    exact = node.outputs[0].dtype.is_floating_point or not any(v.dtype.is_floating_point for v in node.inputs)
    for signature in linear(node, *patterns) if exact else ():
        if all(v.dtype != torch.bool for v, p in zip(node.inputs, signature.inputs, strict=True) if p == P):
            yield signature


def _rule(node: Node, parts: int) -> Iterator[Signature]:
    name = node.op.removeprefix("aten.")
    yield from _splits(node, parts)
    yield from _sums(node, LINEAR.get(name, ()))
    extremes: list[tuple[Placement, Placement]] = []
    if name in INCREASING:
        extremes = [(PMAX, PMAX), (PMIN, PMIN)]
    elif name == "neg.default":
        extremes = [(PMAX, PMIN), (PMIN, PMAX)]
    elif name == "maximum.default":
        extremes = [(PMAX, PMAX)]
    elif name == "minimum.default":
        extremes = [(PMIN, PMIN)]
    for before, after in extremes:
        yield Signature((before,) * len(node.inputs), (after,))
    if name in {"maximum.default", "minimum.default"}:  # of one partial operand, too: max(max(a, b), c)
        kind = extremes[0][0]
        yield Signature((kind, B), (kind,))
        yield Signature((B, kind), (kind,))


enter("elementwise", (*LINEAR, *INCREASING, *OTHERS), _rule)
