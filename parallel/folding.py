"""Repeated layers folded: operations and tensors at the same place in layers of one stack are one for the planner.

A model of 80 equal layers is then planned like one layer with what is before and behind it, each thing counted as often
as it occurs. `parallel.program` chooses for the classes that this module makes.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.graph import Graph, Input, Node, Value, layer_of
from parallel.plans import Placements


@dataclass(frozen=True)
class Classes:
    """What is tied.

    Attributes:
        node: class of each node, in the order of the graph.
        source: class of each input.
        count: members of each class.
        first: a member of each class that stands for all.
        changed: classes of the inputs that the step gives new values.

    """

    node: tuple[int, ...]
    source: tuple[int, ...]
    count: tuple[int, ...]
    first: tuple[Node | Input, ...]
    changed: frozenset[int]


def fold(graph: Graph, pins: Mapping[str, Placements], tied: bool = True) -> Classes:
    """Sort the nodes and inputs of a step into classes.

    Args:
        graph: the step.
        pins: placements by the user's names of inputs; only inputs that are pinned alike are tied, and that the step
            changes alike.
        tied: whether to fold at all; otherwise each is a class of its own.

    """
    numbers: dict[Hashable, int] = {}
    count: Counter[int] = Counter()
    first: list[Node | Input] = []

    def number(key: Hashable, member: Node | Input) -> int:
        found = numbers.setdefault(key, len(numbers))
        if found == len(first):
            first.append(member)
        count[found] += 1
        return found

    seen: Counter[Hashable] = Counter()

    def place(member: Node | Input, path: str, what: Hashable) -> Hashable:
        layer = layer_of(path)
        if layer is None or not tied:
            return member.value.name if isinstance(member, Input) else member.name
        stack, index = layer
        rest = path.removeprefix(f"{stack}.{index}")
        occurrence = seen[stack, index, rest, what]
        seen[stack, index, rest, what] += 1
        return (stack, rest, what, occurrence)

    sources = tuple(
        number(("input", place(source, source.name, _source_kind(graph, source, pins))), source)
        for source in graph.inputs
    )
    nodes = tuple(number(("node", place(node, node.module, (node.phase, form(node)))), node) for node in graph.nodes)
    pairs = zip(graph.inputs, sources, strict=True)
    changed = frozenset(kind for source, kind in pairs if source.name in graph.changed)
    return Classes(nodes, sources, tuple(count[at] for at in range(len(first))), tuple(first), changed)


def _source_kind(graph: Graph, source: Input, pins: Mapping[str, Placements]) -> Hashable:
    changed = source.name in graph.changed
    return source.role, source.value.shape, source.value.dtype, pins.get(source.name), changed


def form(node: Node) -> Hashable:
    """What an operation is but for the names of its values: operations of one form may be sharded alike."""
    values = [(value.shape, value.dtype) for value in (*node.inputs, *node.outputs)]
    constants = (_without_names(node.args), _without_names(tuple(argument for _, argument in node.kwargs)))
    return node.op, tuple(values), constants


def _without_names(argument: Any) -> Hashable:
    """An argument with its values' names left out."""
    if isinstance(argument, Value):
        return "value"
    if isinstance(argument, tuple):
        return tuple(map(_without_names, argument))
    return (type(argument).__name__, argument)
