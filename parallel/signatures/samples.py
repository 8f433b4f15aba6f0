"""Sample calls of every operation in the table, for the verifier.

Sizes are small and unlike each other: some divide by 2, 3 and 4, some leave remainders, some are smaller than a world.
Floats are fp64 of both signs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.graph import Argument, Node, Value, operation


@dataclass(frozen=True, slots=True)
class Drawn:
    """A tensor to draw: normal values, or positive ones, those between 0 and 1, complex ones, integers below `high`, or
    truth values."""

    shape: tuple[int, ...]
    kind: str = "normal"
    high: int = 0

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw it: fp64, complex128, int64 or bool."""
        if self.kind == "ids":
            return torch.randint(self.high, self.shape, generator=generator)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "bool":
            return values > 0
        if self.kind == "complex":
            return torch.complex(values, values.flip(0) + 1)
        if self.kind == "part":
            return values.sigmoid()
        return values.abs() + 0.5 if self.kind == "positive" else values


def f(*shape: int) -> Drawn:
    """Floats of both signs."""
    return Drawn(shape)


def pos(*shape: int) -> Drawn:
    """Floats from 0.5 up."""
    return Drawn(shape, "positive")


def part(*shape: int) -> Drawn:
    """Floats between 0 and 1."""
    return Drawn(shape, "part")


def z(*shape: int) -> Drawn:
    """Complex numbers."""
    return Drawn(shape, "complex")


def ids(high: int, *shape: int) -> Drawn:
    """Indices below `high`."""
    return Drawn(shape, "ids", high)


def flags(*shape: int) -> Drawn:
    """Truth values."""
    return Drawn(shape, "bool")


@dataclass(frozen=True)
class Call:
    """A sample: the node, and the tensors of its inputs."""

    node: Node
    tensors: tuple[Tensor, ...]

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, value.shape)) or "scalar" for value in self.node.inputs)
        rest = [str(arg) for arg in self.node.args if not isinstance(arg, Value | tuple)]
        return f"{self.node.op}({shapes}{' | ' if rest else ''}{', '.join(rest)})"


def call(name: str, *args: Any, **kwargs: Any) -> Call:
    """Draw the tensors and run the operation once, to know what it returns."""
    generator = torch.Generator().manual_seed(len(name) + 31 * len(args))
    tensors: list[Tensor] = []

    def argument(arg: Any) -> Argument:
        if isinstance(arg, Drawn):
            tensor = arg.draw(generator)
            tensors.append(tensor)
            return Value(f"input{len(tensors)}", tuple(tensor.shape), tensor.dtype)
        return tuple(map(argument, arg)) if isinstance(arg, list | tuple) else arg

    given = tuple(map(argument, args))
    named = tuple((key, argument(arg)) for key, arg in kwargs.items())
    whole = Node(name, f"aten.{name}", given, named, ())
    feed = iter(tensors)
    result = operation(whole.op)(*_filled(given, feed), **{key: _filled(arg, feed) for key, arg in named})
    several = isinstance(result, list | tuple)
    results = list(result) if several else [result]
    places = tuple(at for at, part in enumerate(results) if isinstance(part, Tensor) and part.numel())
    outputs = tuple(Value(f"output{at}", tuple(results[at].shape), results[at].dtype) for at in places)
    return Call(Node(name, whole.op, given, named, outputs, places if several else ()), tuple(tensors))


def _filled(arg: Argument, feed: Iterator[Tensor]) -> Any:
    if isinstance(arg, Value):
        return next(feed)
    return [_filled(part, feed) for part in arg] if isinstance(arg, tuple) else arg


SHAPE = (5, 1, 4)
"""Of elementwise operations: uneven, too small, even."""

UNARY = (
    "abs.default", "alias.default", "atan.default", "ceil.default", "cos.default", "cosh.default", "elu.default",
    "erf.default", "erfc.default", "exp.default", "exp2.default", "expm1.default", "floor.default", "frac.default",
    "gelu.default", "hardshrink.default", "hardsigmoid.default", "hardswish.default", "hardtanh.default",
    "leaky_relu.default", "mish.default", "nan_to_num.default", "neg.default", "relu.default", "round.default",
    "sgn.default", "sigmoid.default", "sign.default", "silu.default", "sin.default", "sinh.default",
    "softplus.default", "softshrink.default", "square.default", "tan.default", "tanh.default", "trunc.default",
)  # fmt: skip
POSITIVE = (
    "lgamma.default", "log.default", "log10.default", "log1p.default", "log2.default", "reciprocal.default",
    "rsqrt.default", "sqrt.default",
)  # fmt: skip
BINARY = (
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "minimum.default",
    "logaddexp.default", "remainder.Tensor", "floor_divide.default", "atan2.default", "hypot.default", "clamp.Tensor",
    "clamp_min.Tensor",
)  # fmt: skip
COMPARED = (
    "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor", "eq.Scalar", "ne.Scalar",
    "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar",
)  # fmt: skip
"""Of small integers, so that both answers occur."""
SCALAR = (
    "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar", "fmod.Scalar", "remainder.Scalar",
    "add.Tensor", "mul.Tensor", "div.Tensor", "clamp_min.default", "clamp_max.default", "clamp.default",
)  # fmt: skip
BACKWARD = (
    "gelu_backward.default", "silu_backward.default", "tanh_backward.default", "sigmoid_backward.default",
    "hardsigmoid_backward.default",
)  # fmt: skip


def elementwise() -> Iterator[Call]:
    """Of one, two and three tensors, with scalars, and with broadcasting."""
    yield from (call(name, f(*SHAPE)) for name in UNARY)
    yield from (call(name, pos(*SHAPE)) for name in POSITIVE)
    for name in BINARY:
        yield call(name, f(*SHAPE), f(*SHAPE))
        yield call(name, f(*SHAPE), f(3, 1))
    yield from (call(name, f(*SHAPE), 0.7) for name in SCALAR)
    for name in COMPARED:
        yield call(name, ids(3, *SHAPE), 1 if name.endswith("Scalar") else ids(3, 3, 1))
    for name in ("isinf.default", "isnan.default"):
        yield Call(call(name, f(*SHAPE)).node, (_odd(),))
    yield call("logical_not.default", ids(2, *SHAPE))
    yield from (call(name, f(*SHAPE), f(*SHAPE)) for name in BACKWARD)
    yield call("threshold_backward.default", f(*SHAPE), f(*SHAPE), 0)
    yield call("hardtanh_backward.default", f(*SHAPE), f(*SHAPE), -1, 1)
    yield call("leaky_relu_backward.default", f(*SHAPE), f(*SHAPE), 0.1, False)
    yield call("elu_backward.default", f(*SHAPE), 1, 1, 1, False, f(*SHAPE))
    yield call("softshrink_backward.default", f(*SHAPE), f(*SHAPE), 0.5)
    yield call("logit_backward.default", f(*SHAPE), part(*SHAPE), None)
    yield call("threshold.default", f(*SHAPE), 0.1, 0.2)
    for name in ("acos.default", "asin.default", "erfinv.default"):
        yield call(name, part(*SHAPE))
    yield call("complex.default", f(*SHAPE), f(*SHAPE))
    yield call("polar.default", pos(*SHAPE), f(*SHAPE))
    yield call("conj_physical.default", z(*SHAPE))
    yield call("mul.Tensor", z(*SHAPE), z(4))
    yield call("hardswish_backward.default", f(*SHAPE), f(*SHAPE))
    yield call("softplus_backward.default", f(*SHAPE), f(*SHAPE), 1, 20)
    yield call("native_dropout_backward.default", f(*SHAPE), flags(*SHAPE), 2.0)
    yield call("lerp.Scalar", f(*SHAPE), f(*SHAPE), 0.3)
    yield call("lerp.Tensor", f(*SHAPE), f(*SHAPE), f(4))
    yield call("addcmul.default", f(*SHAPE), f(*SHAPE), f(4), value=0.5)
    yield call("addcdiv.default", f(*SHAPE), f(*SHAPE), pos(4), value=0.5)
    yield call("where.self", flags(5, 1, 1), f(*SHAPE), f(4))
    yield call("where.ScalarOther", flags(*SHAPE), f(*SHAPE), 0.5)
    yield call("where.ScalarSelf", flags(*SHAPE), 0.5, f(*SHAPE))
    yield call("where.Scalar", flags(*SHAPE), 0.5, 1.5)
    yield call("masked_fill.Scalar", f(*SHAPE), flags(4), 0.5)
    yield call("masked_fill.Tensor", f(*SHAPE), flags(4), f())
    yield call("_to_copy.default", ids(9, 5, 4), dtype=torch.float64)
    yield call("_to_copy.default", f(5, 4), dtype=torch.int64)
    yield call("_to_copy.default", flags(5, 4), dtype=torch.float64)
    yield call("pow.Scalar", 0.9, f(*SHAPE))
    yield call("pow.Tensor_Scalar", f(*SHAPE), 3)
    yield call("pow.Tensor_Tensor", pos(*SHAPE), f(4))
    yield call("xlogy.Tensor", pos(*SHAPE), pos(4))
    yield call("div.Tensor_mode", f(*SHAPE), pos(4), rounding_mode="floor")
    yield call("add.Tensor", ids(9, 5, 4), ids(9, 4))
    yield call("mul.Tensor", ids(9, 5, 4), flags(4))
    for name in ("bitwise_and.Tensor", "bitwise_or.Tensor", "logical_and.default", "logical_or.default"):
        yield call(name, flags(*SHAPE), flags(4))
    yield call("bitwise_and.Scalar", ids(9, *SHAPE), 3)
    yield call("bitwise_not.default", flags(*SHAPE))


def _odd() -> Tensor:
    """Numbers, infinities and what is none."""
    odd = torch.tensor([1.0, math.inf, math.nan, -math.inf], dtype=torch.float64)
    return odd.repeat(5)[torch.randperm(20, generator=torch.Generator().manual_seed(3))].reshape(SHAPE)


def products() -> Iterator[Call]:
    """Matrices, batches of them, tokens, weights' gradients, inner products."""
    for equation, shapes in (
        ("ab,bc->ac", [(5, 4), (4, 6)]),
        ("ab,cb->ac", [(4, 7), (1, 7)]),
        ("abc,acd->abd", [(4, 3, 5), (4, 5, 2)]),
        ("xyb,cb->xyc", [(2, 5, 4), (3, 4)]),
        ("xya,xyc->ac", [(5, 4, 3), (5, 4, 2)]),
        ("ab,b->a", [(6, 5), (5,)]),
        ("a,a->", [(7,), (7,)]),
        ("ab,c->abc", [(4, 3), (5,)]),
    ):
        yield call("einsum.default", equation, [f(*shape) for shape in shapes])


def reductions() -> Iterator[Call]:
    """Over one dimension, two and all, kept or not."""
    for dims, keep in (((1,), False), ((0, 2), True), ((0, 1, 2), False), ((-1,), False)):
        yield call("sum.dim_IntList", f(5, 3, 4), dims, keep)
        yield call("amax.default", f(5, 3, 4), dims, keep)
        yield call("amin.default", f(5, 3, 4), dims, keep)
    yield call("sum.dim_IntList", ids(9, 5, 4), (0,))
    yield call("sum.dim_IntList", flags(5, 4), (0,))
    for name in ("prod.dim_int", "argmax.default", "argmin.default", "max.dim", "min.dim", "median.dim"):
        yield call(name, f(5, 3, 4), 1)
    for name in ("any.dim", "all.dim"):
        yield call(name, flags(5, 3, 4), 1)
    yield call("cumsum.default", f(5, 4), 1)
    for name in ("cumprod.default", "cummax.default", "cummin.default", "logcumsumexp.default"):
        yield call(name, f(5, 4), 0)
    yield call("topk.default", f(5, 4), 2)
    yield call("topk.default", f(4, 5), 2, 0)
    yield call("sort.default", f(5, 4))
    yield call("sort.stable", f(5, 4), stable=True, dim=0)
    yield call("flip.default", f(5, 4), (0,))


def views() -> Iterator[Call]:
    """Shapes that merge, split, keep and regroup dimensions."""
    for before, after in (
        ((4, 5), (20,)),
        ((20,), (4, 5)),
        ((5, 4), (20,)),
        ((4, 6, 2), (4, 12)),
        ((5, 6, 2), (5, 12)),
        ((4, 12), (4, 6, 2)),
        ((1, 6), (6,)),
        ((6,), (6, 1)),
        ((4, 6), (6, 4)),
        ((4, 6), (8, 3)),
        ((2, 3, 4), (1, 2, 12, 1)),
        ((4, 3, 1, 5), (12, 5)),
    ):
        yield call("reshape.default", f(*before), after)
        yield call("view.default", f(*before), after)
    yield call("reshape.default", flags(4, 5), (20,))
    yield call("permute.default", f(5, 3, 4), (2, 0, 1))
    yield call("expand.default", f(5, 1, 4), (5, 3, 4))
    yield call("expand.default", f(5, 1), (4, 5, 6))
    yield call("expand.default", f(), (4, 5))
    yield call("slice.Tensor", f(5, 4, 6), 2, 1, 5, 2)
    yield call("slice.Tensor", f(5, 4), 0, 0, 4)
    yield call("cat.default", [f(5, 4), f(5, 3)], 1)
    yield call("cat.default", [f(2, 4), f(1, 4), f(2, 4)], 0)
    yield call("constant_pad_nd.default", f(5, 4), (1, 0))
    yield call("constant_pad_nd.default", f(5, 4, 3), (0, 0, 1, 1), 0.5)
    yield call("roll.default", f(5, 4), (1,), (1,))
    yield call("roll.default", f(5, 4), (1,))
    yield call("view_as_complex.default", f(5, 4, 2))
    yield call("view_as_real.default", z(5, 4))
    yield call("tril.default", f(3, 4, 5))
    yield call("triu.default", f(4, 4, 4), 1)


def indexing() -> Iterator[Call]:
    """Looked up in and written to dimensions of even, uneven and too small size."""
    for rows in (8, 5):
        yield call("embedding.default", f(rows, 4), ids(rows, 5, 3))
        yield call("embedding_dense_backward.default", f(5, 3, 4), ids(rows, 5, 3), rows, -1, False)
        yield call("index_select.default", f(rows, 4, 3), 0, ids(rows, 6))
        yield call("gather.default", f(4, rows), 1, ids(rows, 4, 2))
        yield call("gather.default", f(rows, 3), 0, ids(rows, 5, 3))
        yield call("scatter.value", f(4, rows), 1, ids(rows, 4, 1), -1.0)
        yield call("scatter_add.default", f(4, rows), 1, ids(rows, 4, 6), f(4, 6))
    yield call("embedding.default", f(6, 4), ids(6, 5), 3)
    yield call("embedding_dense_backward.default", f(5, 4), ids(6, 5), 6, 3, False)
    yield call("index_select.default", f(4, 5, 3), 1, ids(5, 7))
    yield call("index.Tensor", f(5, 4, 3), [None, ids(4, 5, 6)])
    yield call("index.Tensor", f(5, 4), [ids(5, 7)])
    yield call("index.Tensor", f(5, 4), [ids(5, 4), ids(4, 4)])
    yield call("index_put.default", f(5, 4, 3), [None, ids(4, 4)], f(5, 4, 3), True)
    yield call("index_put.default", f(5, 4), [ids(5, 1)], f(1, 4))
    yield call("index_put.default", f(6, 4), [ids(6, 5, 3)], f(5, 3, 4), True)
    yield call("index_add.default", f(5, 4, 3), 1, ids(4, 6), f(5, 6, 3))
    yield call("scatter.src", f(4, 5), 1, ids(5, 4, 1), f(4, 1))
    yield call("gather.default", f(4, 1, 3), 1, ids(1, 4, 4, 3))


def layers() -> Iterator[Call]:
    """Norms, softmax, attention of many, few and grouped heads, convolutions, pooling."""
    yield call("native_layer_norm.default", f(5, 4, 6), (6,), f(6), f(6), 1e-5)
    yield call("native_layer_norm.default", f(5, 4, 3), (4, 3), None, None, 1e-5)
    yield call("native_layer_norm.default", f(4, 6), (6,), f(6), None, 1e-5)
    yield from _layer_norm_gradients()
    yield call("_safe_softmax.default", f(5, 4, 3), -1)
    for name in ("_softmax.default", "_log_softmax.default"):
        yield call(name, f(5, 4, 3), -1, False)
        yield call(name, f(5, 4, 3), 1, False)
    for name in ("_softmax_backward_data.default", "_log_softmax_backward_data.default"):
        yield call(name, f(5, 4, 3), f(5, 4, 3), -1, torch.float64)
    yield from _attention(4, 4, True)
    yield from _attention(4, 2, True)
    yield from _attention(5, 5, False)
    yield from _attention(3, 3, False, f(5, 7))
    yield from _convolutions()
    yield call("max_pool2d_with_indices.default", f(5, 4, 6, 6), (2, 2), (2, 2))
    yield call("max_pool2d_with_indices_backward.default", *_pooled())
    yield call("avg_pool2d.default", f(5, 4, 6, 6), (2, 2))
    yield call("avg_pool2d_backward.default", f(5, 4, 3, 3), f(5, 4, 6, 6), (2, 2), (2, 2), (0, 0), False, True, None)
    yield call("avg_pool3d.default", f(5, 4, 4, 4, 4), (2, 2, 2))
    three = ((2, 2, 2), (2, 2, 2), (0, 0, 0))
    yield call("avg_pool3d_backward.default", f(5, 4, 2, 2, 2), f(5, 4, 4, 4, 4), *three, False, True, None)
    yield call("max_pool3d_with_indices.default", f(5, 4, 4, 4, 4), (2, 2, 2), (2, 2, 2))
    places = (*three, (1, 1, 1), False, ids(64, 5, 4, 2, 2, 2))
    yield call("max_pool3d_with_indices_backward.default", f(5, 4, 2, 2, 2), f(5, 4, 4, 4, 4), *places)
    yield from _resampled()
    yield call("_adaptive_avg_pool2d.default", f(5, 4, 6, 6), (2, 3))
    yield call("_adaptive_avg_pool2d_backward.default", f(5, 4, 2, 3), f(5, 4, 6, 6))


def _layer_norm_gradients() -> Iterator[Call]:
    for gain, bias in ((f(6), f(6)), (f(6), None), (None, None)):
        mask = (True, gain is not None, bias is not None)
        args = (f(5, 4, 6), f(5, 4, 6), (6,), f(5, 4, 1), pos(5, 4, 1), gain, bias, mask)
        yield call("native_layer_norm_backward.default", *args)


def _attention(heads: int, groups: int, causal: bool, mask: Drawn | None = None) -> Iterator[Call]:
    name = "_scaled_dot_product_flash_attention_for_cpu"
    query, key = f(3, heads, 5, 4), f(3, groups, 7 if mask else 5, 4)
    extra = {"attn_mask": mask} if mask else {}
    yield call(f"{name}.default", query, key, key, 0.0, causal, **extra)
    # A gradient needs the output and logsumexp of its inputs, else it is not what sharded runs would give.
    lse = f(3, heads, 5)
    yield call(f"{name}_backward.default", query, query, key, key, query, lse, 0.0, causal, **extra)


def _convolutions() -> Iterator[Call]:
    plain: tuple[Any, ...] = ((1, 1), (1, 1), (1, 1), False, (0, 0))
    yield call("convolution.default", f(5, 4, 5, 5), f(6, 4, 3, 3), None, *plain, 1)
    yield call("convolution.default", f(4, 4, 5, 5), f(4, 4, 3, 3), f(4), *plain, 1)
    yield call("convolution.default", f(4, 4, 5, 5), f(4, 2, 3, 3), None, *plain, 2)
    for mask in ((True, True, False), (False, True, False), (True, False, False)):
        args = (f(5, 6, 5, 5), f(5, 4, 5, 5), f(6, 4, 3, 3), None, *plain, 1, mask)
        yield call("convolution_backward.default", *args)
    args = (f(4, 4, 5, 5), f(4, 4, 5, 5), f(4, 2, 3, 3), None, *plain, 2, (True, True, False))
    yield call("convolution_backward.default", *args)


def _resampled() -> Iterator[Call]:
    for kind, dims, aligned in (
        ("nearest1d", 1, ()), ("nearest2d", 2, ()), ("linear1d", 1, (False,)), ("bilinear2d", 2, (False,)),
        ("bicubic2d", 2, (False,)),
    ):  # fmt: skip
        small, large = (3, 4)[:dims], (6, 7)[:dims]
        yield call(f"upsample_{kind}.default", f(5, 4, *small), large, *aligned)
        yield call(f"upsample_{kind}_backward.default", f(5, 4, *large), large, (5, 4, *small), *aligned)


def _pooled() -> Sequence[Any]:
    # Places of the largest elements of 2x2 windows: any place of the input is valid.
    return (f(5, 4, 3, 3), f(5, 4, 6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False, ids(36, 5, 4, 3, 3))


def factories() -> Iterator[Call]:
    """Zeros and others."""
    yield call("full.default", (5, 4), 0, dtype=torch.float64)
    yield call("full.default", (5, 4), 1.5, dtype=torch.float64)
    yield call("full.default", (4,), 0, dtype=torch.int64)
    yield call("full.default", (4,), False, dtype=torch.bool)
    yield call("arange.default", 5)
    yield call("arange.start", 1, 6)
    yield call("arange.start_step", 1, 9, 2)
    yield call("eye.default", 4)
    yield call("linspace.default", 0, 1, 5)


FAMILIES = (elementwise, products, reductions, views, indexing, layers, factories)


def samples() -> Iterator[Call]:
    """All of them."""
    for family in FAMILIES:
        yield from family()
