"""Writes the nodes of a graph, never two in a row that one can do.

Used by `parallel.forms` and `parallel.merging`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.graph import Node, Phase, Value
from parallel.shapes import factors

VIEW, PERMUTE, EINSUM = "aten.reshape.default", "aten.permute.default", "aten.einsum.default"
SUM = "aten.sum.dim_IntList"

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

    def copy(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Value, ...]:
        """Add a node like another one, with other arguments of the same shapes."""
        return self._add(node.op, args, kwargs, [(value.shape, value.dtype) for value in node.outputs], node.places)

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
        if other := self._biased(x, shape) or self._summed(x, tuple(shape)):
            return other
        return x if x.shape == tuple(shape) else self.op(VIEW, (tuple(shape), x.dtype), x, tuple(shape))

    def _biased(self, x: Value, shape: Sequence[int]) -> Value | None:
        """If `x` is a flattened tensor plus a bias: the sum in the other shape, the view having moved to the tensor."""
        maker = self._makers.get(x.name)
        if maker is None or maker.op != "aten.add.Tensor" or maker.kwargs or not shape or len(shape) <= len(x.shape):
            return None
        tensor, bias = maker.args
        if not (isinstance(tensor, Value) and isinstance(bias, Value) and tensor.shape == x.shape):
            return None
        if bias.shape != x.shape[-1:] or tuple(shape[-1:]) != bias.shape:
            return None
        return self.op(maker.op, (tuple(shape), x.dtype), self.view(tensor, shape), bias)

    def _summed(self, x: Value, shape: tuple[int, ...]) -> Value | None:
        """If `x` is a sum that keeps dimensions, all of which the view drops: the sum that does not."""
        maker = self._makers.get(x.name)
        if maker is None or maker.op != SUM or maker.args[2:] != (True,):
            return None
        source, over = maker.args[:2]
        assert isinstance(source, Value) and isinstance(over, tuple)
        if shape != tuple(size for d, size in enumerate(source.shape) if d not in over):
            return None
        return self.op(SUM, (shape, x.dtype), source, over, False, **dict(maker.kwargs))

    def flattened(self, x: Value, over: Sequence[int]) -> tuple[Value, tuple[int, ...]] | None:
        """If `x` is another tensor with only the dimensions `over` flattened: that one, and what these were in it."""
        before = self._through(x, VIEW)
        groups = factors(x.shape, before[0].shape) if before else None
        if before is None or groups is None or any(len(g) > 1 for d, g in enumerate(groups) if d not in over):
            return None
        dims: list[int] = []
        at = 0
        for d, group in enumerate(groups):
            dims += range(at, at + len(group)) if d in over else []
            at += len(group)
        return before[0], tuple(dims)

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
