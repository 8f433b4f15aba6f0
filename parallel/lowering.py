"""From what torch traced to a `Graph`: aliases vanish, views are written in one form, dead code goes.

Used by `parallel.capture`; the forms that remain are told in `parallel.forms`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from collectives.errors import CaptureError
from parallel import update
from parallel.anchoring import anchor
from parallel.forms import FORMS
from parallel.graph import Graph, Input, Node, Output, Role, Value
from parallel.merging import merge
from parallel.modules import Watch
from parallel.writer import Writer


@dataclass(frozen=True)
class Source:
    """An input of the trace: its role, the user's name for it, its fake tensor."""

    role: Role
    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Captured:
    """A trace of forward and backward.

    It takes the tensors of `sources`, gives the loss and a gradient (or None) for each of them that requires one, then
    the `buffers`, by name, as they are at its end. `watch` knows which module each node belongs to.
    """

    sources: Sequence[Source]
    traced: fx.GraphModule
    watch: Watch
    buffers: Sequence[str]


def lower(captured: Captured, optimizer: Optimizer, kept: Mapping[str, update.Slots]) -> Graph:
    """Write the trace as a graph, and the optimizer's update behind it."""
    lowering = _Lowering(captured)
    loss, *results = lowering.run()
    nodes = _living(lowering.writer.nodes, [value for value in (loss, *results) if value is not None])
    for rewritten in (merge, anchor):
        nodes, now = rewritten(nodes)
        loss, *results = (value and now.get(value.name, value) for value in (loss, *results))
    assert loss is not None
    moved = [source.name for source in captured.sources if source.tensor.requires_grad]
    gradients = {name: value for name, value in zip(moved, results, strict=False) if value is not None}
    parameters = {source.name: source.value for source in lowering.inputs if source.role == Role.PARAMETER}
    given = {source.name: source.value for source in lowering.inputs if source.role == Role.BUFFER}
    writer = update.write(optimizer, kept, parameters, gradients)
    outputs = [
        Output(loss, Role.LOSS, "loss"),
        *(Output(value, Role.GRADIENT, name) for name, value in gradients.items()),
        *writer.outputs,
        *(
            Output(value, Role.BUFFER, name)
            for name, value in zip(captured.buffers, results[len(moved) :], strict=True)
            if value is not None and value != given[name]
        ),
    ]
    nodes = _living([*nodes, *writer.nodes], [output.value for output in outputs])
    return Graph((*lowering.inputs, *writer.inputs), tuple(nodes), tuple(outputs), lowering.constants)


def _living(nodes: Sequence[Node], results: Sequence[Value]) -> list[Node]:
    """The nodes that a result depends on."""
    wanted = {value.name for value in results}
    living = []
    for node in reversed(nodes):
        if any(value.name in wanted for value in node.outputs):
            wanted.update(value.name for value in node.inputs)
            living.append(node)
    return living[::-1]


_DROPPED = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "implicit"}
"""Arguments that change no value."""


class _Lowering:
    """Walks the trace once."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.inputs: list[Input] = []
        self.constants: dict[str, Tensor] = {}
        self.writer = Writer()
        self._known: dict[fx.Node, Any] = {}

    def run(self) -> list[Value | None]:
        """Lower every node; return what the trace gives."""
        sources = iter(self.captured.sources)
        for position, node in enumerate(self.captured.traced.graph.nodes):
            if node.op == "placeholder":
                source = next(sources)
                self._known[node] = self._input(source.role, source.name, source.tensor)
            elif node.op == "get_attr":
                self._known[node] = self._constant(str(node.target))
            elif node.op == "output":
                return [None if part is None else self._known[part] for part in _leaves(node.args[0])]
            elif node.target is getitem:
                self._known[node] = self._known[node.args[0]][node.args[1]]
            else:
                self.writer.phase, self.writer.module = self.captured.watch.place(position)
                self._known[node] = self._node(node)
        raise AssertionError("a trace ends in its output")

    def _input(self, role: Role, name: str, tensor: Tensor) -> Value:
        value = Value(f"{role}_{name}".replace(".", "_"), tuple(tensor.shape), tensor.dtype)
        self.inputs.append(Input(value, role, name))
        return value

    def _constant(self, target: str) -> Value:
        tensor = getattr(self.captured.traced, target)
        name = target.strip("_")
        if name in self.constants:
            return next(source.value for source in self.inputs if source.name == name)
        self.constants[name] = tensor.detach()
        return self._input(Role.CONSTANT, name, tensor)

    def _node(self, node: fx.Node) -> Any:
        args = [self._argument(node, arg) for arg in node.args]
        kwargs = {name: self._argument(node, arg) for name, arg in node.kwargs.items() if name not in _DROPPED}
        fake = node.meta.get("val")
        if fake is None:  # it only checks what it is given
            return None
        form = FORMS.get(str(node.target))
        return (
            form(self.writer, fake, *args, **kwargs) if form else self.writer.like(str(node.target), fake, args, kwargs)
        )

    def _argument(self, node: fx.Node, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self._known[arg]
        if isinstance(arg, list | tuple):
            return tuple(self._argument(node, part) for part in arg)
        if isinstance(arg, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise CaptureError(f"{node.name} ({node.target}): {arg} depends on data; use sizes that are known before")
        return None if isinstance(arg, torch.device | torch.layout | torch.memory_format) else arg


def _leaves(result: Any) -> Iterator[Any]:
    if isinstance(result, list | tuple):
        for part in result:
            yield from _leaves(part)
    else:
        yield result
