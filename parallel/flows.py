"""Who makes what for whom: the values of a step by class, and the edges along which they may have to be resharded.

`parallel.program` gives each edge its variables. Values that are made by one class and taken by the same classes are
one family; they are counted, not repeated.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from parallel.folding import Classes
from parallel.graph import Graph, Role, Value

LOSS = -1
"""The class of the loss's end: it is wanted whole on every rank."""


class Edge(NamedTuple):
    """A class of values on its way to a class that takes it.

    `maker` and `output`: class, and which of its outputs; `user` and `slot`: class, and which of its tensor arguments
    (-1: the end of a step's output, in the placement of the input of class `user`).
    """

    maker: int
    output: int
    user: int
    slot: int


@dataclass(frozen=True, slots=True)
class Use:
    """One value taken at one place: by the node of that number, or (at the number of nodes) at the end of the step."""

    edge: Edge
    at: int


@dataclass(frozen=True)
class Flow:
    """One value of the graph: where it is made (-1: given), its class, and its uses in order."""

    value: Value
    maker: int
    output: int
    born: int
    uses: tuple[Use, ...]
    kept: bool
    """Whether it lasts to the end of the step."""


@dataclass(frozen=True)
class Flows:
    """All values of a step.

    Attributes:
        values: in the order in which they are made.
        families: of the edges that leave a value, how many values there are that have just these.
        example: a value of each edge.

    """

    values: tuple[Flow, ...]
    families: dict[tuple[Edge, ...], int]
    example: dict[Edge, Value]


def trace(graph: Graph, classes: Classes) -> Flows:
    """Follow every value from its maker to its users."""
    uses: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for at, node in enumerate(graph.nodes):
        for slot, value in enumerate(node.inputs):
            uses[value.name].append((classes.node[at], slot, at))
    kinds = {(source.role, source.name): kind for source, kind in zip(graph.inputs, classes.source, strict=True)}
    kept = set()
    for end in graph.outputs:
        if end.role == Role.GRADIENT:
            continue
        kept.add(end.value.name)
        user = LOSS if end.role == Role.LOSS else kinds[end.role, end.name]
        uses[end.value.name].append((user, -1, len(graph.nodes)))
    made = [(source.value, kind, 0, -1) for source, kind in zip(graph.inputs, classes.source, strict=True)]
    for at, node in enumerate(graph.nodes):
        made += [(value, classes.node[at], output, at) for output, value in enumerate(node.outputs)]
    values: list[Flow] = []
    example: dict[Edge, Value] = {}
    families: dict[tuple[Edge, ...], int] = defaultdict(int)
    for value, maker, output, born in made:
        found = []
        for user, slot, at in uses[value.name]:
            edge = Edge(maker, output, user, slot)
            if slot >= 0 or user != maker or born >= 0:  # an input that nothing changes ends as it began
                found.append(Use(edge, at))
                example.setdefault(edge, value)
        families[tuple(sorted({use.edge for use in found}))] += 1
        values.append(Flow(value, maker, output, born, tuple(found), value.name in kept))
    families.pop((), None)
    return Flows(tuple(values), dict(families), example)
