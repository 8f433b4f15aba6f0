"""The forms in which a graph's operations are written, few enough for small tables of signatures.

Used by `parallel.lowering`. Every change of shape is a `view` with all sizes written out (where one is run on shards it
may copy, so nothing needs `contiguous`), every exchange of dimensions a `permute`, and of two in a row one remains;
every matrix product is an `einsum`; pieces of tensors are `slice`, joined by `cat`; constants are `full`. Dimensions
are counted from the front.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.graph import Node, Phase, Value

Made = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of an output."""


class Writer:
    """Appends nodes, in the phase and module that are set."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.phase = Phase.FORWARD
        self.module = ""
        self._makers: dict[str, Node] = {}
        self._counts: dict[str, int] = {}
        self._once: dict[tuple[Any, ...], Value] = {}

    def _add(
        self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], made: Sequence[Made], places: tuple[int, ...]
    ) -> tuple[Value, ...]:
        short = op.split(".")[1].strip("_")
        count = self._counts[short] = self._counts.get(short, -1) + 1
        title = f"{short}_{count}" if count else short
        values = tuple(Value(f"{title}.{at}" if places else title, *what) for at, what in enumerate(made))
        node = Node(title, op, tuple(args), tuple(kwargs.items()), values, places, self.phase, self.module)
        self.nodes.append(node)
        self._makers.update((value.name, node) for value in values)
        return values

    def like(self, op: str, fake: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Add a node whose results are like `fake`; return its value, or a list of them (None where it gives none)."""
        if isinstance(fake, Tensor):
            return self._add(op, args, kwargs, [(tuple(fake.shape), fake.dtype)], ())[0]
        places = tuple(at for at, part in enumerate(fake) if isinstance(part, Tensor))
        values = self._add(op, args, kwargs, [(tuple(fake[at].shape), fake[at].dtype) for at in places], places)
        by_place = dict(zip(places, values, strict=True))
        return [by_place.get(at) for at in range(len(fake))]

    def op(self, name: str, made: Made, *args: Any, **kwargs: Any) -> Value:
        """Add a node with one output, unless there is the same already."""
        key = (name, args, tuple(kwargs.items()))
        if key not in self._once:
            self._once[key] = self._add(name, args, kwargs, [made], ())[0]
        return self._once[key]

    def _through(self, value: Value, op: str) -> tuple[Value, tuple[int, ...]] | None:
        """Operand and second argument of the node that makes `value`, if it is of this kind."""
        maker = self._makers.get(value.name)
        if maker is None or maker.op != op:
            return None
        operand, rest = maker.args
        assert isinstance(operand, Value) and isinstance(rest, tuple)
        return operand, tuple(int(part) for part in rest if isinstance(part, int))

    def view(self, x: Value, shape: Sequence[int]) -> Value:
        """The elements in the same order, in another shape."""
        if before := self._through(x, VIEW):
            x = before[0]
        return x if x.shape == tuple(shape) else self.op(VIEW, (tuple(shape), x.dtype), x, tuple(shape))

    def permute(self, x: Value, dims: Sequence[int]) -> Value:
        """Dimension `i` of the result is dimension `dims[i]` of `x`."""
        if before := self._through(x, PERMUTE):
            x, dims = before[0], [before[1][d] for d in dims]
        if list(dims) == sorted(dims):
            return x
        return self.op(PERMUTE, (tuple(x.shape[d] for d in dims), x.dtype), x, tuple(dims))

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        """Repeat dimensions of size 1."""
        shape = tuple(shape)
        return x if x.shape == shape else self.op("aten.expand.default", (shape, x.dtype), x, shape)

    def slice(self, x: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
        """Elements `start`, `start + step`... before `stop` of a dimension."""
        size = x.shape[dim]
        start, stop, step = slice(start, stop, step).indices(size)
        stop = max(start, stop)
        if (start, stop, step) == (0, size, 1):
            return x
        shape = (*x.shape[:dim], -((start - stop) // step), *x.shape[dim + 1 :])
        return self.op("aten.slice.Tensor", (shape, x.dtype), x, dim, start, stop, step)

    def einsum(self, equation: str, a: Value, b: Value) -> Value:
        """A product of two tensors in Einstein's notation; exchanges of their dimensions go into the letters."""
        left, _, right = equation.partition("->")
        sizes: dict[str, int] = {}
        terms, operands = [], []
        for letters, value in zip(left.split(","), (a, b), strict=True):
            sizes.update(zip(letters, value.shape, strict=True))
            operand, dims = self._through(value, PERMUTE) or (value, tuple(range(len(letters))))
            terms.append("".join(letters[dims.index(d)] for d in range(len(letters))))
            operands.append(operand)
        equation = f"{','.join(terms)}->{right}"
        return self.op(EINSUM, (tuple(sizes[letter] for letter in right), a.dtype), equation, tuple(operands))


VIEW, PERMUTE, EINSUM = "aten.view.default", "aten.permute.default", "aten.einsum.default"

Form = Callable[..., Value | list[Value]]
FORMS: dict[str, Form] = {}
"""By the name of a traced operation: how it is written. Called with the writer, the fake result, then its arguments."""


def _made(fake: Tensor) -> Made:
    return tuple(fake.shape), fake.dtype


def _form(*names: str) -> Callable[[Form], Form]:
    def add(function: Form) -> Form:
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


@_form("split.Tensor", "split_with_sizes.default")
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


def _filled(value: float) -> Form:
    def fill(writer: Writer, fake: Tensor, *_like: Any, **_dtype: Any) -> Value:
        return writer.op(FULL, _made(fake), tuple(fake.shape), value, dtype=fake.dtype)

    return fill


FULL = "aten.full.default"
_form("zeros.default", "zeros_like.default", "new_zeros.default")(_filled(0))
_form("ones.default", "ones_like.default", "new_ones.default")(_filled(1))


@_form("full.default", "full_like.default", "scalar_tensor.default", "new_full.default")
def _full(writer: Writer, fake: Tensor, *args: Any, **_dtype: Any) -> Value:
    return _filled(args[-1])(writer, fake)


@_form("sum.dim_IntList")
def _sum(
    writer: Writer, fake: Tensor, x: Value, dims: Sequence[int] | None, keep: bool = False, *, dtype: Any = None
) -> Value:
    over = tuple(sorted(d % len(x.shape) for d in dims or range(len(x.shape)))) if x.shape else ()
    if not over:
        return x
    kwargs = {} if x.dtype == fake.dtype else {"dtype": fake.dtype}
    return writer.op("aten.sum.dim_IntList", _made(fake), x, over, keep, **kwargs)


@_form("_to_copy.default")
def _to_copy(writer: Writer, fake: Tensor, x: Value, *, dtype: torch.dtype | None = None) -> Value:
    if dtype in {None, x.dtype}:
        return x
    return writer.op("aten._to_copy.default", _made(fake), x, dtype=fake.dtype)


@_form("copy.default")
def _copy(writer: Writer, fake: Tensor, _into: Value, source: Value) -> Value:
    return writer.expand(_to_copy(writer, fake, source, dtype=fake.dtype), fake.shape)
