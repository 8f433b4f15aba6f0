"""A training step as a plain value: one flat graph of aten operations, forward, backward and update.

`parallel.capture` makes it, `parallel.signatures` says how each node may be sharded, the planner chooses, the executor
runs it. Nothing in the graph is mutated: every value is made once, by one node, or given from outside as an input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from collectives.errors import UsageError


class Phase(StrEnum):
    """Part of the step that a node belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


class Role(StrEnum):
    """What an input or output is to the user."""

    PARAMETER = "parameter"
    """Named as in the model; as an output, its new value."""
    STATE = "state"
    """Of the optimizer: `<parameter>.exp_avg`, or `step`, the steps taken before this one (fp64, no dimensions)."""
    BUFFER = "buffer"
    """Of the model, such as a running mean; as an output, its new value."""
    BATCH = "batch"
    """A tensor of the batch: `batch`, `batch.0`, `batch.tokens`."""
    RATE = "rate"
    """The learning rate of a parameter group: `lr.0`, `lr.1` (fp64, no dimensions)."""
    CONSTANT = "constant"
    """A tensor that the model's code wrote down."""
    LOSS = "loss"
    GRADIENT = "gradient"
    """Of the loss by the parameter of that name."""


KEPT = frozenset({Role.PARAMETER, Role.STATE, Role.BUFFER})
"""Roles of what a step hands on to the next."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph: a unique name, the global shape, the dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


Argument: TypeAlias = "Value | int | float | bool | str | torch.dtype | tuple[Argument, ...] | None"
"""An argument of an operation: a value of the graph, a constant, or a list of them."""


def flatten(argument: Argument) -> Iterator[Value]:
    """The values in an argument, in order."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple):
        for part in argument:
            yield from flatten(part)


def substitute(argument: Argument, values: Iterator[Tensor]) -> Any:
    """Return the argument with the next of `values` in the place of each value of the graph."""
    if isinstance(argument, Value):
        return next(values)
    if isinstance(argument, tuple):
        return [substitute(part, values) for part in argument]
    return argument


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Args:
        name: unique in the graph.
        op: name of the aten operation with its overload, such as `aten.mm.default`.
        args, kwargs: what it is called with; constants are those of the unsharded step.
        outputs: the tensors that it makes, in order; what an operation returns beside them (None) is left out.
        places: where each output is among what the operation returns; empty: it returns the one output itself.
        phase: forward, backward or update.
        module: path of the module whose code it is (or whose gradient or parameter), such as `layers.3.attention`.

    """

    name: str
    op: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    outputs: tuple[Value, ...]
    places: tuple[int, ...] = ()
    phase: Phase = Phase.FORWARD
    module: str = ""

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Its tensor arguments in order, those in lists too; one that is given twice is there twice."""
        return tuple(flatten(self.args)) + tuple(value for _, arg in self.kwargs for value in flatten(arg))

    @property
    def layer(self) -> tuple[str, int] | None:
        """The repeated layer that it belongs to: `("layers", 3)`; None outside of any."""
        return layer_of(self.module)

    def call(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the operation on whole tensors, one for each of `inputs`; return one for each of `outputs`."""
        feed = iter(tensors)
        args = [substitute(argument, feed) for argument in self.args]
        kwargs = {name: substitute(argument, feed) for name, argument in self.kwargs}
        return self.pick(operation(self.op)(*args, **kwargs))

    def prepared(self) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
        """`call`, with all that does not depend on the tensors done beforehand: for who calls it again and again."""
        if any(isinstance(argument, tuple) and any(flatten(argument)) for argument in self.args):
            return self.call
        if any(any(flatten(argument)) for _, argument in self.kwargs):
            return self.call
        call, places = operation(self.op), self.places
        kwargs = {name: substitute(argument, iter(())) for name, argument in self.kwargs}
        values = [isinstance(argument, Value) for argument in self.args]
        rest = [substitute(arg, iter(())) for arg, value in zip(self.args, values, strict=True) if not value]
        leading = len(values) - len(rest)

        if not all(values[:leading]):
            return self.call

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            result = call(*tensors, *rest, **kwargs)
            return tuple([result[place] for place in places]) if places else (result,)

        return run

    def pick(self, result: Any) -> tuple[Tensor, ...]:
        """The outputs among what the operation returned."""
        return tuple(result[place] for place in self.places) if self.places else (result,)

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        return f"{self.name} = {self.op}({inputs})" + (f" of module {self.module}" if self.module else "")


def layer_of(module: str) -> tuple[str, int] | None:
    """The outermost numbered part of a module's path: `("model.layers", 3)` of `model.layers.3.attention`."""
    parts = module.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:at]), int(part)
    return None


_OPERATIONS: dict[str, Any] = {}


def operation(name: str) -> Any:
    """The torch operator of a name such as `aten.mm.default`.

    Raises:
        UsageError: this torch has no such operator.

    """
    if name not in _OPERATIONS:
        found: Any = torch.ops
        try:
            for part in name.split("."):
                found = getattr(found, part)
        except AttributeError:
            raise UsageError(f"torch {torch.__version__} has no operator {name}; capture the step again") from None
        _OPERATIONS[name] = found
    return _OPERATIONS[name]


@dataclass(frozen=True, slots=True)
class Input:
    """A value given from outside, with its role and the name that the user knows it by.

    `parameter` is the name of the parameter that an optimizer's state belongs to, else empty.
    """

    value: Value
    role: Role
    name: str
    parameter: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """A value that the step gives: the loss, a gradient, a new parameter or state."""

    value: Value
    role: Role
    name: str


@dataclass(frozen=True)
class Graph:
    """A step: inputs, nodes in an order in which they can run, outputs.

    An output may be an input that nothing changed. `constants` holds the tensors of the inputs with role `CONSTANT`.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def makers(self) -> dict[str, Node]:
        """The node that makes each value, by the value's name; inputs are not there."""
        return {value.name: node for node in self.nodes for value in node.outputs}

    @cached_property
    def users(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that take each value, by the value's name; those that nobody takes are not there."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in {value.name: None for value in node.inputs}:
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def named(self) -> dict[str, Input]:
        """The inputs by the user's names."""
        return {source.name: source for source in self.inputs}

    @cached_property
    def changed(self) -> frozenset[str]:
        """The inputs that a step hands on with a new value, by the user's names."""
        given = {source.value for source in self.inputs}
        return frozenset(out.name for out in self.outputs if out.role in KEPT and out.value not in given)

    def output(self, role: Role, name: str = "") -> Output:
        """The output of a role and, unless it is the loss, a name.

        Raises:
            UsageError: the step has no such output.

        """
        for found in self.outputs:
            if found.role == role and (not name or found.name == name):
                return found
        raise UsageError(f"the step has no {role} {name}".rstrip())

    def run(self, inputs: Mapping[str, Tensor]) -> dict[tuple[Role, str], Tensor]:
        """Run the step on whole tensors in this process: the reference that plans are compared with.

        Args:
            inputs: a tensor for each input by the user's name; constants may be left out.

        Returns:
            The outputs by role and name.

        Raises:
            UsageError: an input is missing.

        """
        tensors: dict[str, Tensor] = {}
        for source in self.inputs:
            known = self.constants if source.role == Role.CONSTANT else inputs
            if source.name not in known:
                raise UsageError(f"the step needs the {source.role} {source.name!r}; it is not among the inputs")
            tensors[source.value.name] = known[source.name]
        last = {value.name: at for at, node in enumerate(self.nodes) for value in node.inputs}
        kept = {out.value.name for out in self.outputs}
        for at, node in enumerate(self.nodes):
            results = node.call([tensors[value.name] for value in node.inputs])
            tensors.update(zip((value.name for value in node.outputs), results, strict=True))
            for value in {*node.inputs, *node.outputs}:
                if last.get(value.name, -1) <= at and value.name not in kept:
                    del tensors[value.name]
        return {(out.role, out.name): tensors[out.value.name] for out in self.outputs}
