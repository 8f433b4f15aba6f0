"""In which order a ring visits its ranks: the tour whose slowest link is fastest, and among those the shortest.

Called by `collectives.arrangement`. All links of a ring are busy at once, so the slowest decides; the rest is a
travelling salesman. Up to EXACT ranks both are solved by dynamic programming over subsets (Held and Karp, "A dynamic
programming approach to sequencing problems", 1962). Above, tours from several starts are improved by moving segments,
forwards and turned round, until no move helps (2-opt and or-opt); how far that can be from the best is told by spanning
trees: a tour less one link is one, so no tour is shorter than the lightest tree, nor its slowest link faster than that
of this tree.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

EXACT = 9
"""Ranks up to which the best tour is found."""
_ROUNDS = 50
"""Improvements of one start, each the best of all moves: more than small worlds need, and an end for large ones."""
_STARTS = 4

Costs = Sequence[Sequence[float]]
"""Seconds from rank (row) to rank (column); the diagonal is not looked at."""
Price = tuple[float, float]
"""The slowest link of a tour, and the sum of all; what is less is better."""


@dataclass(frozen=True, slots=True)
class Tour:
    """A closed tour. `order` begins with rank 0; no tour has a slowest link or a sum below the bounds."""

    order: tuple[int, ...]
    slowest: float
    total: float
    least_slowest: float
    least_total: float
    exact: bool


def best_tour(costs: Costs) -> Tour:
    """Find a tour of all ranks; the same for the same costs."""
    world = len(costs)
    exact = world <= EXACT
    order = _by_subsets(costs) if exact else _by_moves(costs)
    slowest, total = _price(costs, order)
    if exact:
        return Tour(order, slowest, total, slowest, total, True)
    tree = list(_lightest_tree(costs))
    return Tour(order, slowest, total, max(tree), sum(tree), False)


def _price(costs: Costs, order: Sequence[int]) -> Price:
    links = [costs[src][dst] for src, dst in pairwise((*order, order[0]))] if len(order) > 1 else [0.0]
    return max(links), sum(links)


def _by_subsets(costs: Costs) -> tuple[int, ...]:
    """The shortest tour of those whose slowest link is fastest; of equal ones the first by its numbers."""
    levels = sorted({costs[src][dst] for src in range(len(costs)) for dst in range(len(costs)) if src != dst})
    low, high = 0, max(0, len(levels) - 1)
    while low < high:  # a tour without slow links exists or not: bisect
        middle = (low + high) // 2
        low, high = (low, middle) if _shortest(costs, levels[middle]) else (middle + 1, high)
    found = _shortest(costs, levels[low] if levels else 0.0)
    assert found is not None, "all links together hold a tour"
    return found


def _shortest(costs: Costs, limit: float) -> tuple[int, ...] | None:
    """The shortest tour by links of up to `limit`, if there is one."""
    world = len(costs)
    paths: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(1, 0): (0.0, (0,))}
    for _ in range(world - 1):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (seen, last), (length, path) in paths.items():
            for rank in range(1, world):
                if seen >> rank & 1 or costs[last][rank] > limit:
                    continue
                key, found = (seen | 1 << rank, rank), (length + costs[last][rank], (*path, rank))
                if key not in longer or found < longer[key]:
                    longer[key] = found
        paths = longer
    closed = [
        (length + (costs[last][0] if world > 1 else 0.0), path)
        for (_, last), (length, path) in paths.items()
        if world == 1 or costs[last][0] <= limit
    ]
    return min(closed)[1] if closed else None


def _by_moves(costs: Costs) -> tuple[int, ...]:
    """The best of some tours that no move improves."""
    world = len(costs)
    starts = [tuple(range(world)), *(_greedy(costs, first) for first in range(0, world, -(-world // _STARTS)))]
    return min((_price(costs, order), order) for order in (_improved(costs, start) for start in starts))[1]


def _greedy(costs: Costs, first: int) -> tuple[int, ...]:
    """Always to the nearest rank that is left."""
    order, left = [first], set(range(len(costs))) - {first}
    while left:
        order.append(min(left, key=lambda rank: (costs[order[-1]][rank], rank)))
        left.remove(order[-1])
    return _turned(order)


def _improved(costs: Costs, order: tuple[int, ...]) -> tuple[int, ...]:
    price = _price(costs, order)
    for _ in range(_ROUNDS):
        better = min((_price(costs, moved), moved) for moved in _moves(costs, order))
        if better[0] >= price:
            break
        price, order = better
    return order


def _moves(costs: Costs, order: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Tours in which a segment is turned round, or up to three ranks are elsewhere.

    In large worlds only those that part with the slowest link: else there are too many to try.
    """
    world = len(order)
    ends = range(world)
    if world > 4 * EXACT:
        worst = max(range(world), key=lambda at: costs[order[at]][order[(at + 1) % world]])
        ends = range(worst, worst + 1)
    for at in ends:
        turned = order[at + 1 :] + order[: at + 1]  # the link in question is the one that closes the tour
        for stop in range(2, world):
            yield _turned(turned[:stop][::-1] + turned[stop:])
        for size in (1, 2, 3):
            head, rest = turned[:size], turned[size:]
            for place in range(1, len(rest)):
                yield _turned(rest[:place] + head + rest[place:])


def _turned(order: Sequence[int]) -> tuple[int, ...]:
    """The same tour, from rank 0 on."""
    at = list(order).index(0)
    return (*order[at:], *order[:at])


def _lightest_tree(costs: Costs) -> Iterator[float]:
    """The links of a lightest spanning tree, each as cheap as its cheaper direction (Prim, 1957)."""
    world = len(costs)
    near = {rank: min(costs[0][rank], costs[rank][0]) for rank in range(1, world)}
    while near:
        rank = min(near, key=lambda other: (near[other], other))
        yield near.pop(rank)
        for other, link in near.items():
            near[other] = min(link, costs[rank][other], costs[other][rank])
