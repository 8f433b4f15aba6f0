"""The integer program whose best solution is a plan.

Binary variables choose an option for each unit of operations and a placement for each class of inputs. Along each edge
a flow says in which placement a value is made and in which it is wanted: its margins are those choices, so the linear
relaxation is tight and often integral by itself (as in Alpa, arXiv 2201.12023, section 4). A value that several
operations want in the same placement is resharded once and paid once.

`parallel.planner` builds it, `parallel.solver` solves it, `parallel.liveness`
adds the memory limit where it binds.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from parallel.cost import Costs
from parallel.flows import LOSS, Edge, Flows
from parallel.folding import Classes
from parallel.graph import Graph, Input, Node, Value
from parallel.layout import Partial, Split
from parallel.options import Options
from parallel.plans import Option, Placements, Sharding
from parallel.units import Joint, unite

Vector = npt.NDArray[np.float64]
Pair = tuple[Placements, Placements]
Terms = Mapping[int, float]
"""Coefficients of variables, by their numbers."""

LAUNCH_TIE, MEMORY_TIE, PARTIAL_TIE, STRIDED_TIE = 1e-8, 1e-7, 1e-10, 2e-11
"""What a launch, holding every tensor whole instead of none, a result of partial values, and one whose shard does not
lie in one piece are worth where times are equal, as shares of the time that all operations need: ties are broken by the
number of launches, then by memory, then for adding up early (a gradient is reduced rather than the parameter that it
has changed), then for what is sent without packing it."""
_ALONE = 45_000
"""Changes of placement below which each operation is chosen for by itself."""


@dataclass
class Crossing:
    """An edge between units.

    Attributes:
        made, wanted: placements at its ends, in the order of its rows.
        above, below: numbers of the rows that give its flow these margins.
        pairs: variables of the changes that are in the program.

    """

    made: tuple[Placements, ...]
    wanted: tuple[Placements, ...]
    above: int
    below: int
    pairs: dict[Pair, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A class of values: the edges that leave it, the families that share them, what a change of one value costs."""

    value: Value
    edges: tuple[Edge, ...]
    families: tuple[tuple[tuple[Edge, ...], int], ...]
    made: tuple[Placements, ...]
    wanted: tuple[Placements, ...]
    prices: Vector


class Program:
    """Variables between 0 and 1, an objective in seconds, and rows; all can be added to."""

    def __init__(
        self,
        graph: Graph,
        costs: Costs,
        classes: Classes,
        flows: Flows,
        options: Options,
    ) -> None:
        self.graph, self.costs, self.classes, self.flows = graph, costs, classes, flows
        self.objective: list[float] = []
        self.binary: list[bool] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self._entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self.limits: list[int] = []
        """Numbers of the rows that keep memory within a limit."""
        self.first: list[int] = []
        """The number of the variable of each unit's first option; the others follow."""
        self.crossings: dict[Edge, Crossing] = {}
        self.least = max(cheapest(options, classes, costs), 1e-12)
        """Seconds that all operations take at their fastest."""
        self._whole = sum(flow.value.nbytes for flow in flows.values) or 1
        self._prices: dict[tuple[int, Option], float] = {}
        self.units = unite(classes, flows, options, self._price, alone=changes(flows, options) < _ALONE)
        for joints, kinds in zip(self.units.joints, self.units.members, strict=True):
            self._choose(joints, kinds)
        for edge in flows.example:
            if edge not in self.units.within:
                self._connect(edge)
        self.sources = self._sources()
        for source in self.sources:
            for i, j in np.argwhere(np.isfinite(source.prices)):
                self._admit(source, int(i), int(j))

    def variable(self, cost: float = 0.0, binary: bool = False) -> int:
        """Add a variable between 0 and 1."""
        self.objective.append(cost)
        self.binary.append(binary)
        return len(self.objective) - 1

    def row(self, terms: Terms, low: float, high: float) -> int:
        """Add a row `low <= sum of terms <= high`."""
        self.low.append(low)
        self.high.append(high)
        number = len(self.low) - 1
        for variable, value in terms.items():
            self.entry(number, variable, value)
        return number

    def entry(self, row: int, variable: int, value: float) -> None:
        """Add a term to a row."""
        self._entries[0].append(row)
        self._entries[1].append(variable)
        self._entries[2].append(value)

    def matrix(self) -> Any:
        """The rows' terms, (rows, variables)."""
        rows, columns, values = self._entries
        return csr_array((values, (rows, columns)), shape=(len(self.low), len(self.objective)))

    def made(self, maker: int, output: int) -> dict[Placements, list[int]]:
        """The choices that make a value in each placement."""
        return self._by(maker, lambda option: option.outputs[output] if isinstance(option, Sharding) else option)

    def wanted(self, user: int, slot: int) -> dict[Placements, list[int]]:
        """The choices that want a value in each placement; of the loss, no choice but one placement."""
        if user == LOSS:
            return {self.costs.everywhere: []}
        return self._by(user, lambda option: option.inputs[slot] if isinstance(option, Sharding) else option)

    def pairs(self, edge: Edge) -> dict[Pair, int]:
        """Variables of the changes along an edge; none within a unit."""
        return self.crossings[edge].pairs if edge in self.crossings else {}

    def chosen(self, solution: Vector) -> dict[int, Option]:
        """The option of each class in an integral solution."""
        found: dict[int, Option] = {}
        for kinds, first, joints in zip(self.units.members, self.first, self.units.joints, strict=True):
            joint = joints[int(np.argmax(solution[first : first + len(joints)]))]
            found.update(zip(kinds, joint, strict=True))
        return found

    def _admit(self, source: Source, i: int, j: int) -> None:
        """Let values of a class change from one placement to another, along every edge whose end wants the latter."""
        pair = before, after = source.made[i], source.wanted[j]
        numbers: dict[Edge, int] = {}
        for edge in source.edges:
            crossing = self.crossings[edge]
            if after in crossing.wanted:
                number = numbers[edge] = crossing.pairs[pair] = self.variable()
                self.entry(crossing.above + crossing.made.index(before), number, 1.0)
                self.entry(crossing.below + crossing.wanted.index(after), number, 1.0)
        seconds = float(source.prices[i, j])
        if before == after or not seconds:
            return
        for edges, count in source.families:
            users = [numbers[edge] for edge in edges if edge in numbers]
            price = count * (seconds + LAUNCH_TIE * self.least)
            if len(users) == 1:
                self.objective[users[0]] += price
            elif users:
                shared = self.variable(price)
                for user in users:
                    self.row({shared: 1.0, user: -1.0}, 0.0, np.inf)

    def _by(self, kind: int, key: Callable[[Any], Placements]) -> dict[Placements, list[int]]:
        unit, at = self.units.place[kind]
        found: dict[Placements, list[int]] = defaultdict(list)
        for number, joint in enumerate(self.units.joints[unit], self.first[unit]):
            found[key(joint[at])].append(number)
        return found

    def _choose(self, joints: Sequence[Joint], kinds: Sequence[int]) -> None:
        self.first.append(len(self.objective))
        prices = [sum(map(self._price, kinds, joint)) for joint in joints]
        numbers = [self.variable(price, binary=True) for price in prices]
        self.row(dict.fromkeys(numbers, 1.0), 1.0, 1.0)

    def _price(self, kind: int, option: Option) -> float:
        if (kind, option) not in self._prices:
            tie = MEMORY_TIE * self.least * _held(self.classes, self.costs, kind, option) / self._whole
            tie += PARTIAL_TIE * self.least * self.classes.count[kind] * _partial(option)
            tie += STRIDED_TIE * self.least * self.classes.count[kind] * _strided(self.classes.first[kind], option)
            self._prices[kind, option] = price(self.classes, self.costs, kind, option) + tie
        return self._prices[kind, option]

    def _connect(self, edge: Edge) -> None:
        """Rows that give the flow along an edge the margins that are chosen at its ends."""
        made, wanted = self.made(edge.maker, edge.output), self.wanted(edge.user, edge.slot)
        above, below = len(self.low), len(self.low) + len(made)
        for choices in (*made.values(), *wanted.values()):
            fixed = float(not choices)
            self.row(dict.fromkeys(choices, -1.0), fixed, fixed)
        self.crossings[edge] = Crossing(tuple(made), tuple(wanted), above, below)

    def _sources(self) -> list[Source]:
        leaving: dict[tuple[int, int], list[Edge]] = defaultdict(list)
        for edge in self.crossings:
            leaving[edge.maker, edge.output].append(edge)
        families: dict[tuple[int, int], list[tuple[tuple[Edge, ...], int]]] = defaultdict(list)
        for edges, count in self.flows.families.items():
            outside = tuple(edge for edge in edges if edge in self.crossings)
            if outside:
                families[outside[0].maker, outside[0].output].append((outside, count))
        found = []
        for key, going in leaving.items():
            made = self.crossings[going[0]].made
            wanted = tuple(dict.fromkeys(placed for edge in going for placed in self.crossings[edge].wanted))
            value = self.flows.example[going[0]]
            prices = self.costs.prices(value, made, wanted)
            found.append(Source(value, tuple(going), tuple(families[key]), made, wanted, prices))
        return found


def price(classes: Classes, costs: Costs, kind: int, option: Option) -> float:
    """Seconds that all members of a class take with an option; of inputs, the refreshing of their second copies."""
    member = classes.first[kind]
    if isinstance(member, Input):
        assert not isinstance(option, Sharding)
        return classes.count[kind] * costs.refresh(member, option) if kind in classes.changed else 0.0
    assert isinstance(option, Sharding)
    return classes.count[kind] * costs.operation(member, option)


def _held(classes: Classes, costs: Costs, kind: int, option: Option) -> int:
    """Bytes of all that the members of a class make or are."""
    member, count = classes.first[kind], classes.count[kind]
    if isinstance(member, Input):
        assert not isinstance(option, Sharding)
        return count * (costs.local_bytes(member.value, option) + costs.copy_bytes(member, option))
    assert isinstance(option, Sharding)
    pairs = zip(member.outputs, option.outputs, strict=True)
    return count * sum(costs.local_bytes(value, placed) for value, placed in pairs)


def _partial(option: Option) -> int:
    """How many results an option leaves partial."""
    made = option.outputs if isinstance(option, Sharding) else ()
    return sum(any(isinstance(placement, Partial) for placement in placed) for placed in made)


def _strided(member: Node | Input, option: Option) -> int:
    """How many results an option splits along another dimension than the first that has more than one element."""
    if isinstance(member, Input) or not isinstance(option, Sharding):
        return 0
    return sum(
        isinstance(placement, Split) and any(extent > 1 for extent in value.shape[: placement.dim])
        for value, placed in zip(member.outputs, option.outputs, strict=True)
        for placement in placed
    )


def cheapest(options: Options, classes: Classes, costs: Costs) -> float:
    """Seconds that all operations take if each runs in the way that is cheapest for it: no plan takes less."""
    return sum(min(price(classes, costs, kind, option) for option in every) for kind, every in options.items())


def changes(flows: Flows, options: Options) -> int:
    """About how many changes of placement there are between options, along all edges."""
    total = 0
    for edge in flows.example:
        made = {o.outputs[edge.output] if isinstance(o, Sharding) else o for o in options[edge.maker]}
        taken = options.get(edge.user, ()) if edge.user != LOSS else ()
        wanted = {o.inputs[edge.slot] if isinstance(o, Sharding) else o for o in taken}
        total += len(made) * len(wanted)
    return total
