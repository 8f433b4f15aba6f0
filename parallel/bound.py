"""A lower bound of every plan's time, and what each option adds to it, without solving the whole program.

The dual of the program's linear relaxation by block coordinate ascent: each edge has prices for the placements in which
its value may be made and prices for those in which it may be wanted; a pair of these never exceeds what the change
costs. Whatever they are, no plan takes less than the sum, over all classes, of the cheapest option with the prices of
its placements. Sweeps over the classes raise that sum, as in sequential tree-reweighted message passing
(Kolmogorov, PAMI 2006). An option that is dearer than its class's cheapest by more than a known plan is above the bound
is in no better plan. Called by `parallel.planner` where the program with all options is too large.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.cost import Costs
from parallel.flows import LOSS, Edge, Flows
from parallel.options import Options
from parallel.plans import Option, Placements, Sharding

Vector = npt.NDArray[np.float64]
_IMPOSSIBLE = 1e3
"""What a change that cannot be made costs, as a multiple of the time that all operations take at their fastest."""


class End:
    """One end of an edge.

    Attributes:
        kind: the class there.
        placements: those that its options make or want.
        of_option: for each option, which of these.
        price: of each placement.

    """

    def __init__(self, kind: int, of_option: list[Placements]) -> None:
        self.kind = kind
        self.placements = tuple(dict.fromkeys(of_option))
        numbers = {placed: number for number, placed in enumerate(self.placements)}
        self.of_option = np.array([numbers[placed] for placed in of_option])
        self._order = np.argsort(self.of_option, kind="stable")
        self._starts = np.searchsorted(self.of_option[self._order], np.arange(len(self.placements)))
        self.price: Vector = np.zeros(len(self.placements))

    def least(self, by_option: Vector) -> Vector:
        """The least of the options of each placement."""
        found: Vector = np.minimum.reduceat(by_option[self._order], self._starts)
        return found


@dataclass(eq=False)
class Family:
    """Values of which a change is paid once for all edges along which it is wanted.

    Attributes:
        cost: of each change, from each placement in which they are made to each that any edge wants.
        spent: what of it the prices of all edges claim.

    """

    cost: Vector
    spent: Vector


@dataclass(eq=False)
class Link:
    """An edge.

    Attributes:
        columns: where the placements of the user's end are among those of its families.
        shares: of its claim, that each family bears.
        alone: whether no other edge claims anything of these.

    """

    maker: End
    user: End
    columns: npt.NDArray[np.int64]
    shares: list[tuple[Family, float]]
    alone: bool

    def __post_init__(self) -> None:
        self._claim: Vector = np.zeros((len(self.maker.placements), len(self.user.placements)))
        self._all = np.minimum.reduce([family.cost[:, self.columns] / share for family, share in self.shares])

    def pull(self, end: End) -> None:
        """Raise the prices of an end as far as those of the other, and other edges, let them."""
        room = self._all
        if not self.alone:
            rooms = [(family.cost - family.spent)[:, self.columns] / share for family, share in self.shares]
            room = self._claim + (rooms[0] if len(rooms) == 1 else np.minimum.reduce(rooms))
        if end is self.maker:
            end.price = (room - self.user.price).min(axis=1)
        else:
            end.price = (room - self.maker.price[:, None]).min(axis=0)
        self.claim()

    def claim(self) -> None:
        """Tell the families what the prices come to."""
        if not self.alone:
            claim = np.maximum(self.maker.price[:, None] + self.user.price, 0.0)
            for family, share in self.shares:
                family.spent[:, self.columns] += share * (claim - self._claim)
            self._claim = claim


class Bound:
    """Prices, at first none. `rise` improves them.

    Args:
        costs: of the step.
        flows: its edges.
        options: of all classes.
        alone: seconds of each option of each class, without changes of placement.
        less: seconds to be taken off, for what is paid for in `alone` although plans do not pay it.

    """

    def __init__(
        self, costs: Costs, flows: Flows, options: Options, alone: Mapping[int, Vector], less: float = 0.0
    ) -> None:
        self._alone, self._less = {**alone, LOSS: np.zeros(1)}, less
        impossible = _IMPOSSIBLE * sum(float(prices.min()) for prices in alone.values())
        self._ends: dict[int, list[tuple[Link, End, End]]] = defaultdict(list)
        for link in _links(costs, flows, options, impossible):
            self._ends[link.maker.kind].append((link, link.maker, link.user))
            self._ends[link.user.kind].append((link, link.user, link.maker))
        order = [*sorted(kind for kind in self._alone if kind != LOSS), LOSS]
        place = {kind: number for number, kind in enumerate(order)}
        self._sweeps = [
            [self._visit(kind, place, 1) for kind in order],
            [self._visit(kind, place, -1) for kind in reversed(order)],
        ]

    @property
    def value(self) -> float:
        """Seconds that no plan can be below."""
        return float(sum(self.priced(kind).min() for kind in self._alone)) - self._less

    def priced(self, kind: int) -> Vector:
        """The options of a class with the prices of their placements."""
        found: Vector = self._alone[kind] + sum(end.price[end.of_option] for _, end, _ in self._ends[kind])
        return found

    def rise(self) -> None:
        """Sweep over the classes forward and back: each takes what its neighbours leave, and hands on what it can."""
        for visit in (*self._sweeps[0], *self._sweeps[1]):
            for link, end in visit.all:
                link.pull(end)
            if visit.ahead:
                priced = self.priced(visit.kind)
                spare = (priced - priced.min()) * visit.weight
                for link, end in visit.ahead:
                    end.price = end.price - end.least(spare)
                    link.claim()

    def _visit(self, kind: int, place: dict[int, int], way: int) -> "_Visit":
        ends = self._ends[kind]
        steps = [way * (place[other.kind] - place[kind]) for _, _, other in ends]
        ahead = [(link, end) for (link, end, _), step in zip(ends, steps, strict=True) if step > 0]
        behind = sum(step < 0 for step in steps)
        return _Visit(kind, [(link, end) for link, end, _ in ends], ahead, 1.0 / max(len(ahead), behind, 1))


@dataclass(frozen=True)
class _Visit:
    """A class in a sweep: its ends, those whose other end comes later, and what each of these gets of a surplus."""

    kind: int
    all: list[tuple[Link, End]]
    ahead: list[tuple[Link, End]]
    weight: float


def _links(costs: Costs, flows: Flows, options: Options, impossible: float) -> list[Link]:
    """The edges, with budgets for the changes along them."""
    leaving: dict[tuple[int, int], list[Edge]] = defaultdict(list)
    for edge in flows.example:
        leaving[edge.maker, edge.output].append(edge)
    families: dict[tuple[int, int], list[tuple[tuple[Edge, ...], int]]] = defaultdict(list)
    for edges, count in flows.families.items():
        families[edges[0].maker, edges[0].output].append((edges, count))
    found = []
    for source, going in leaving.items():
        made = [_made(option, source[1]) for option in options[source[0]]]
        users = {
            edge: End(
                edge.user,
                [costs.everywhere] if edge.user == LOSS else [_wanted(o, edge.slot) for o in options[edge.user]],
            )
            for edge in going
        }
        rows = tuple(dict.fromkeys(made))
        union = tuple(dict.fromkeys(placed for end in users.values() for placed in end.placements))
        table = costs.prices(flows.example[going[0]], rows, union)
        table = np.where(np.isfinite(table), table, impossible)
        budgets = [(members, Family(count * table, np.zeros_like(table)), count) for members, count in families[source]]
        for edge, user in users.items():
            mine = [(members, family, count) for members, family, count in budgets if edge in members]
            whole = sum(count for _, _, count in mine)
            shares = [(family, count / whole) for _, family, count in mine]
            columns = np.array([union.index(placed) for placed in user.placements])
            alone = all(len(members) == 1 for members, _, _ in mine)
            found.append(Link(End(edge.maker, made), user, columns, shares, alone))
    return found


def _made(option: Option, output: int) -> Placements:
    return option.outputs[output] if isinstance(option, Sharding) else option


def _wanted(option: Option, slot: int) -> Placements:
    return option.inputs[slot] if isinstance(option, Sharding) else option
