"""The forms in which a graph's operations are written, few enough for small tables of signatures.

Used by `parallel.lowering`. Every change of shape is a `view` with all sizes written out (where one is run on shards it
may copy, so nothing needs `contiguous`), every exchange of dimensions a `permute`, and of two in a row one remains;
every matrix product is an `einsum`; pieces of tensors are `slice`, joined by `cat`; constants are `full`. Dimensions
are counted from the front.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from parallel.graph import Value
from parallel.writer import SUM, Made, Writer

FULL, PAD = "aten.full.default", "aten.constant_pad_nd.default"

Form = Callable[..., Value | list[Value] | list[Value | None]]
FORMS: dict[str, Form] = {}
"""By the name of a traced operation: how it is written. Called with the writer, the fake result, then its arguments."""


def _made(fake: Tensor) -> Made:
    return tuple(fake.shape), fake.dtype


_F = TypeVar("_F", bound=Form)


def _form(*names: str) -> Callable[[_F], _F]:
    def add(function: _F) -> _F:
        FORMS.update((f"aten.{name}", function) for name in names)
        return function

    return add


@_form("detach.default", "alias.default", "clone.default", "lift_fresh_copy.default", "contiguous.default")
def _same(_writer: Writer, _fake: Tensor, x: Value) -> Value:
    return x


@_form(
    "view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default", "squeeze.default", "squeeze.dim",
    "squeeze.dims",
)  # fmt: skip
def _view(writer: Writer, fake: Tensor, x: Value, *_how: Any) -> Value:
    return writer.view(x, fake.shape)


@_form("as_strided.default")
def _as_strided(
    writer: Writer, fake: Tensor, x: Value, sizes: Sequence[int], strides: Sequence[int], offset: int | None = None
) -> Value:
    """A view, if it only names another shape of a whole tensor."""
    dense = [math.prod(fake.shape[d + 1 :]) for d in range(fake.dim())]
    if fake.numel() == x.size and list(strides) == dense and not offset:
        return writer.view(x, fake.shape)
    return writer.op("aten.as_strided.default", _made(fake), x, tuple(sizes), tuple(strides), offset)


@_form("t.default")
def _t(writer: Writer, _fake: Tensor, x: Value) -> Value:
    return writer.permute(x, range(len(x.shape))[::-1])


@_form("transpose.int")
def _transpose(writer: Writer, _fake: Tensor, x: Value, one: int, other: int) -> Value:
    dims = list(range(len(x.shape)))
    dims[one], dims[other] = dims[other], dims[one]
    return writer.permute(x, dims)


@_form("permute.default")
def _permute(writer: Writer, _fake: Tensor, x: Value, dims: Sequence[int]) -> Value:
    return writer.permute(x, [d % len(x.shape) for d in dims])


@_form("expand.default")
def _expand(writer: Writer, fake: Tensor, x: Value, _sizes: Any) -> Value:
    return writer.expand(writer.view(x, (1,) * (fake.dim() - len(x.shape)) + x.shape), fake.shape)


@_form("repeat.default")
def _repeat(writer: Writer, fake: Tensor, x: Value, times: Sequence[int]) -> Value:
    """Each dimension with one in front of it that counts the repetitions."""
    sizes = (1,) * (len(times) - len(x.shape)) + x.shape
    pairs = [extent for time, size in zip(times, sizes, strict=True) for extent in (time, size)]
    apart = writer.view(x, [extent for size in sizes for extent in (1, size)])
    return writer.view(writer.expand(apart, pairs), fake.shape)


@_form("mm.default")
def _mm(writer: Writer, _fake: Tensor, a: Value, b: Value) -> Value:
    return writer.einsum("ab,bc->ac", a, b)


@_form("bmm.default")
def _bmm(writer: Writer, _fake: Tensor, a: Value, b: Value) -> Value:
    return writer.einsum("abc,acd->abd", a, b)


@_form("mv.default")
def _mv(writer: Writer, _fake: Tensor, a: Value, b: Value) -> Value:
    return writer.einsum("ab,b->a", a, b)


@_form("dot.default")
def _dot(writer: Writer, _fake: Tensor, a: Value, b: Value) -> Value:
    return writer.einsum("a,a->", a, b)


@_form("slice.Tensor")
def _slice(
    writer: Writer,
    _fake: Tensor,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Value:
    dim %= len(x.shape)
    return writer.slice(x, dim, start or 0, x.shape[dim] if stop is None else stop, step)


@_form("select.int")
def _select(writer: Writer, fake: Tensor, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.shape)
    index %= x.shape[dim]
    return writer.view(writer.slice(x, dim, index, index + 1), fake.shape)


def _padded(writer: Writer, fake: Tensor, x: Value, dim: int, start: int) -> Value:
    """Zeros in front of and behind a dimension, so that it is as long as that of `fake`."""
    if x.shape == tuple(fake.shape):
        return x
    padding = [0] * (2 * fake.dim())
    padding[2 * (fake.dim() - 1 - dim)] = start
    padding[2 * (fake.dim() - 1 - dim) + 1] = fake.shape[dim] - start - x.shape[dim]
    return writer.op(PAD, _made(fake), x, tuple(padding))


@_form("slice_backward.default")
def _slice_backward(
    writer: Writer, fake: Tensor, x: Value, sizes: tuple[int, ...], dim: int, start: int, stop: int, step: int
) -> Value:
    dim %= fake.dim()
    start = slice(start, stop).indices(fake.shape[dim])[0]
    if step != 1:  # step - 1 zeros behind each element
        front, count, back = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
        apart = writer.view(x, (*front, count, 1, *back))
        padding = (0, 0) * len(back) + (0, step - 1)
        spread = writer.op(PAD, ((*front, count, step, *back), x.dtype), apart, padding)
        x = writer.slice(writer.view(spread, (*front, count * step, *back)), dim, 0, fake.shape[dim] - start)
    return _padded(writer, fake, x, dim, start)


@_form("select_backward.default")
def _select_backward(writer: Writer, fake: Tensor, x: Value, _sizes: tuple[int, ...], dim: int, index: int) -> Value:
    dim %= fake.dim()
    row = writer.view(x, (*fake.shape[:dim], 1, *fake.shape[dim + 1 :]))
    return _padded(writer, fake, row, dim, index % fake.shape[dim])


@_form("split.Tensor", "unsafe_split.Tensor", "split_with_sizes.default")
def _split(writer: Writer, fakes: Sequence[Tensor], x: Value, _how: Any, dim: int = 0) -> list[Value]:
    pieces, at = [], 0
    for fake in fakes:
        pieces.append(writer.slice(x, dim % len(x.shape), at, at + fake.shape[dim]))
        at += fake.shape[dim]
    return pieces


@_form("unbind.int")
def _unbind(writer: Writer, fakes: Sequence[Tensor], x: Value, dim: int = 0) -> list[Value]:
    return [_select(writer, fake, x, dim, index) for index, fake in enumerate(fakes)]


@_form("cat.default")
def _cat(writer: Writer, fake: Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    parts = tuple(part for part in parts if part.shape != (0,))  # what torch leaves out of a cat
    if len(parts) == 1:
        return parts[0]
    return writer.op("aten.cat.default", _made(fake), parts, dim % fake.dim())


@_form("stack.default")
def _stack(writer: Writer, fake: Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= fake.dim()
    shape = (*fake.shape[:dim], 1, *fake.shape[dim + 1 :])
    return _cat(writer, fake, [writer.view(part, shape) for part in parts], dim)


@_form("slice_scatter.default")
def _slice_scatter(
    writer: Writer,
    fake: Tensor,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Value:
    """`x[start:stop] = source`: what is in front, what is written, what is behind, joined."""
    dim %= len(x.shape)
    size = x.shape[dim]
    start, stop, step = slice(start, stop, step).indices(size)
    if step != 1:
        return writer.op("aten.slice_scatter.default", _made(fake), x, source, dim, start, stop, step)
    stop = max(start, stop)
    pieces = (writer.slice(x, dim, 0, start), source, writer.slice(x, dim, stop, size))
    return _cat(writer, fake, [piece for piece in pieces if piece.shape[dim]], dim)


@_form("select_scatter.default")
def _select_scatter(writer: Writer, fake: Tensor, x: Value, source: Value, dim: int, index: int) -> Value:
    """`x[index] = source`."""
    dim %= len(x.shape)
    index %= x.shape[dim]
    row = writer.view(source, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return _slice_scatter(writer, fake, x, row, dim, index, index + 1)


@_form("_conj.default")
def _conj(writer: Writer, fake: Tensor, x: Value) -> Value:
    """With its signs in memory: what is only noted as conjugate cannot be sent."""
    return writer.op("aten.conj_physical.default", _made(fake), x)


@_form("_neg_view.default")
def _neg_view(writer: Writer, fake: Tensor, x: Value) -> Value:
    return writer.op("aten.neg.default", _made(fake), x)


def _filled(value: float) -> Callable[..., Value]:
    def fill(writer: Writer, fake: Tensor, *_like: Any, **_dtype: Any) -> Value:
        return writer.op(FULL, _made(fake), tuple(fake.shape), value, dtype=fake.dtype)

    return fill


_form("zeros.default", "zeros_like.default", "new_zeros.default", "empty_like.default", "new_empty.default")(_filled(0))
_form("ones.default", "ones_like.default", "new_ones.default")(_filled(1))


@_form("full.default", "full_like.default", "scalar_tensor.default", "new_full.default")
def _full(writer: Writer, fake: Tensor, *args: Any, **_dtype: Any) -> Value:
    return _filled(args[-1])(writer, fake)


@_form("sum.dim_IntList")
def _sum(
    writer: Writer, fake: Tensor, x: Value, dims: Sequence[int] | None, keep: bool = False, *, dtype: Any = None
) -> Value:
    over = tuple(sorted(d % len(x.shape) for d in dims or range(len(x.shape)))) if x.shape else ()
    kwargs = {} if x.dtype == fake.dtype else {"dtype": fake.dtype}
    if all(x.shape[d] == 1 for d in over):
        return writer.view(_to_copy(writer, fake, x, dtype=fake.dtype), fake.shape)
    if apart := writer.flattened(x, over):  # sum over what the dimensions were before
        source, dims = apart
        kept = tuple(size for d, size in enumerate(source.shape) if d not in dims)
        total = writer.op(SUM, (kept, fake.dtype), source, dims, False, **kwargs)
        return writer.view(total, fake.shape)
    return writer.op(SUM, _made(fake), x, over, keep, **kwargs)


@_form("convolution.default")
def _convolution(writer: Writer, fake: Tensor, x: Value, weight: Value, bias: Value | None, *how: Any) -> Value:
    """The bias comes in behind the sum over input channels, which may be partial."""
    out = writer.op("aten.convolution.default", _made(fake), x, weight, None, *how)
    if bias is None:
        return out
    channels = writer.view(bias, (bias.shape[0], *[1] * (fake.dim() - 2)))
    return writer.op("aten.add.Tensor", _made(fake), out, channels)


@_form("convolution_backward.default")
def _convolution_backward(
    writer: Writer, fakes: Sequence[Tensor | None], gradient: Value, x: Value, weight: Value, _bias: Any, *how: Any
) -> list[Value | None]:
    *same, (of_x, of_weight, of_bias) = how
    op = "aten.convolution_backward.default"
    found = writer.like(op, [*fakes[:2], None], (gradient, x, weight, None, *same, (of_x, of_weight, False)), {})
    if of_bias:
        over = tuple(d for d in range(len(gradient.shape)) if d != 1)
        made = (gradient.shape[1],), gradient.dtype
        found[2] = writer.op(SUM, made, gradient, over, False)
    return list(found)


@_form("native_layer_norm.default")
def _layer_norm(
    writer: Writer, fakes: Sequence[Tensor], x: Value, shape: Any, gain: Value | None, bias: Value | None, eps: float
) -> list[Value]:
    """With half-precision input and gain or bias in fp32, torch's CPU kernel gives means and deviations in fp32; the
    fake one does not know."""
    kept = next((part.dtype for part in (gain, bias) if part is not None), x.dtype)
    known = [fakes[0], *(fake.to(kept) for fake in fakes[1:])]
    made: list[Value] = writer.like("aten.native_layer_norm.default", known, (x, tuple(shape), gain, bias, eps), {})
    return made


@_form("pow.Tensor_Scalar")
def _pow(writer: Writer, fake: Tensor, x: Value, exponent: float) -> Value:
    if exponent == 1:
        return x
    return writer.op("aten.pow.Tensor_Scalar", _made(fake), x, exponent)


@_form("_to_copy.default")
def _to_copy(writer: Writer, fake: Tensor, x: Value, *, dtype: torch.dtype | None = None) -> Value:
    if dtype in {None, x.dtype}:
        return x
    return writer.op("aten._to_copy.default", (x.shape, fake.dtype), x, dtype=fake.dtype)


@_form("copy.default")
def _copy(writer: Writer, fake: Tensor, _into: Value, source: Value) -> Value:
    return writer.expand(_to_copy(writer, fake, source, dtype=fake.dtype), fake.shape)
