"""The best plan of a small graph by trying everything: what the planner is compared with.

It shares nothing with the planner but what a single operation and a single reshard cost, and the options of a node.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from parallel.boxing import boxing
from parallel.cost import Costs, local_size
from parallel.graph import Graph, Input, Output, Role, Value
from parallel.layout import Layout
from parallel.options import of_input, of_node
from parallel.plans import Placements, Sharding

_SLACK = 1e-9


def window(graph: Graph, first: int, count: int) -> Graph:
    """Some nodes of a graph as one of its own: what it takes from before is a batch, what it leaves a gradient."""
    nodes = graph.nodes[first : first + count]
    made = {value.name for node in nodes for value in node.outputs}
    taken = {value.name: value for node in nodes for value in node.inputs if value.name not in made}
    used = {value.name for node in nodes for value in node.inputs}
    ends = [value for node in nodes for value in node.outputs if value.name not in used]
    outputs = tuple(
        Output(value, Role.LOSS, "") if number == len(ends) - 1 else Output(value, Role.GRADIENT, value.name)
        for number, value in enumerate(ends)
    )
    return Graph(tuple(Input(value, Role.BATCH, name) for name, value in taken.items()), nodes, outputs)


@dataclass
class Brute:
    """Tries every combination of options; gives up a branch once it costs more than `at_most`."""

    graph: Graph
    costs: Costs
    at_most: float
    memory: float | None = None
    found: float = field(default=float("inf"), init=False)
    tried: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._options = [of_node(node, self.costs.mesh) for node in self.graph.nodes]
        self._priced = [
            sorted((self.costs.operation(node, option), number) for number, option in enumerate(options))
            for node, options in zip(self.graph.nodes, self._options, strict=True)
        ]
        self._least = [sum(prices[0][0] for prices in self._priced[at:]) for at in range(len(self._priced) + 1)]
        self._inputs = [of_input(source, self.costs.mesh) for source in self.graph.inputs]

    def best(self) -> float:
        """Seconds of the best plan; infinite if none is below `at_most` or keeps within the memory."""
        self._node(0, 0.0, {}, [])
        return self.found

    def _node(self, at: int, spent: float, made: Mapping[str, Placements], chosen: list[Sharding]) -> None:
        if spent + self._least[at] > min(self.at_most, self.found - _SLACK):
            return
        if at == len(self.graph.nodes):
            self._end(spent, made, chosen)
            return
        node = self.graph.nodes[at]
        for price, number in self._priced[at]:
            option = self._options[at][number]
            for known, extra in self._given(node.inputs, option.inputs, made, chosen):
                outputs = {v.name: p for v, p in zip(node.outputs, option.outputs, strict=True)}
                self._node(at + 1, spent + price + extra, {**known, **outputs}, [*chosen, option])

    def _given(
        self,
        values: tuple[Value, ...],
        wanted: tuple[Placements, ...],
        made: Mapping[str, Placements],
        chosen: list[Sharding],
    ) -> Iterator[tuple[dict[str, Placements], float]]:
        """Ways to place the inputs of the graph that are met for the first time, and what the reshards cost."""
        new = [
            n for n, source in enumerate(self.graph.inputs) if source.value in values and source.value.name not in made
        ]

        def place(left: list[int], known: dict[str, Placements]) -> Iterator[dict[str, Placements]]:
            if not left:
                yield known
                return
            for placed in self._inputs[left[0]]:
                yield from place(left[1:], {**known, self.graph.inputs[left[0]].value.name: placed})

        before = self._taken(chosen)
        for known in place(new, dict(made)):
            pairs = {(v, p) for v, p in zip(values, wanted, strict=True)} - before
            cost = [self._reshard(value, known[value.name], placed) for value, placed in pairs]
            if None not in cost:
                yield known, sum(price for price in cost if price is not None)

    def _taken(self, chosen: list[Sharding]) -> set[tuple[Value, Placements]]:
        pairs = zip(self.graph.nodes, chosen, strict=False)
        return {pair for node, option in pairs for pair in zip(node.inputs, option.inputs, strict=True)}

    def _reshard(self, value: Value, before: Placements, after: Placements) -> float | None:
        if before == after:
            return 0.0
        mesh = self.costs.mesh
        try:
            change = boxing(Layout(mesh, before), Layout(mesh, after), value.shape)
        except Exception:
            return None
        return self.costs.reshard(value, change)

    def _end(self, spent: float, made: Mapping[str, Placements], chosen: list[Sharding]) -> None:
        loss = self.graph.output(Role.LOSS).value
        last = self._reshard(loss, made[loss.name], self.costs.everywhere)
        self.tried += 1
        if last is None or spent + last >= self.found:
            return
        if self.memory is None or self._peak(made, chosen) <= self.memory:
            self.found = spent + last

    def _peak(self, made: Mapping[str, Placements], chosen: list[Sharding]) -> float:
        """The most bytes that are held while any node runs, or at the end."""
        end = len(self.graph.nodes)
        loss = self.graph.output(Role.LOSS).value
        uses: dict[str, list[tuple[int, Placements]]] = {loss.name: [(end, self.costs.everywhere)]}
        for at, (node, option) in enumerate(zip(self.graph.nodes, chosen, strict=True)):
            for value, placed in zip(node.inputs, option.inputs, strict=True):
                uses.setdefault(value.name, []).append((at, placed))
        births = [(source.value, 0) for source in self.graph.inputs]
        births += [(value, at) for at, node in enumerate(self.graph.nodes) for value in node.outputs]
        held = [0.0] * (end + 1)
        for value, born in births:
            spans = [(made[value.name], born, max([at for at, _ in uses.get(value.name, [])] or [born]))]
            for placed in {p for _, p in uses.get(value.name, []) if p != made[value.name]}:
                when = [at for at, p in uses[value.name] if p == placed]
                spans.append((placed, min(when), max(when)))
            for placed, first, last in spans:
                for at in range(first, last + 1):
                    held[at] += local_size(value.shape, placed, self.costs.mesh.shape) * value.dtype.itemsize
        return max(held)
