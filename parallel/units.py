"""Operations that the planner chooses for together: a cheap one goes as the only operation that takes its result does.

A chain such as view, permute, multiply makes no difference for what is communicated wherever in it a reshard stands, so
a light operation whose result has one user becomes part of that user's unit, within which nothing is resharded; and all
operations of the update of one parameter are one unit. The options of a unit are what its members' options make
together; of those that look the same from outside the cheapest stays. `parallel.program` chooses an option for each.
Small steps do without: there each operation is chosen for by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parallel.flows import Edge, Flows
from parallel.folding import Classes
from parallel.graph import Node, Phase
from parallel.layout import Partial
from parallel.plans import Option, Placements, Sharding

Joint = tuple[Option, ...]
"""An option for each member of a unit."""

_MOST = 160
"""Options of a unit; members that would make it more stay apart."""
# fmt: off
_LIGHT = frozenset((
    "add", "sub", "mul", "div", "neg", "abs", "pow", "sqrt", "rsqrt", "exp", "log", "sigmoid", "silu", "gelu",
    "relu", "tanh", "where", "maximum", "minimum", "clamp", "lerp", "addcmul", "addcdiv", "reciprocal", "reshape",
    "permute", "expand", "slice", "_to_copy", "full", "threshold_backward", "gelu_backward", "eq", "ne", "lt", "le",
    "gt", "ge", "sin", "cos", "logical_not", "square", "rsub", "constant_pad_nd",
))
# fmt: on


_Key = tuple[tuple[Placements, ...], tuple[Placements, ...]]
"""What a joint option shows outside, and what later members will take of it."""
Price = Callable[[int, Option], float]
"""Seconds of a class under an option."""


@dataclass(frozen=True)
class Units:
    """What is chosen together.

    Attributes:
        members: of each unit, by class, in an order in which they can run.
        joints: options of each unit: one option for each member.
        place: the unit of each class, and its place among the members.
        within: edges that lie within units.

    """

    members: tuple[tuple[int, ...], ...]
    joints: tuple[tuple[Joint, ...], ...]
    place: Mapping[int, tuple[int, int]]
    within: frozenset[Edge]


def light(node: Node) -> bool:
    """Whether an operation takes little time and each element of its result comes from one of each input."""
    return node.op.split(".")[1] in _LIGHT


def unite(
    classes: Classes, flows: Flows, options: Mapping[int, Sequence[Option]], price: Price, alone: bool = False
) -> Units:
    """Sort classes into units, or leave each `alone`.

    A unit that has too many options does without partial values, or falls apart.
    """
    found: list[tuple[tuple[int, ...], tuple[Joint, ...]]] = []
    within: set[Edge] = set()
    groups = [(kind,) for kind in range(len(classes.first))] if alone else _groups(classes, flows)
    owner = {kind: number for number, kinds in enumerate(groups) for kind in kinds}
    inner: dict[int, list[Edge]] = defaultdict(list)
    outside: dict[int, tuple[set[int], set[int]]] = {kind: (set(), set()) for kind in owner}
    for edge in flows.example:
        if edge.slot >= 0 and edge.maker != edge.user and owner[edge.maker] == owner[edge.user]:
            inner[owner[edge.maker]].append(edge)
            continue
        outside[edge.maker][1].add(edge.output)
        if edge.slot >= 0:
            outside[edge.user][0].add(edge.slot)
    for number, kinds in enumerate(groups):
        joints = join(kinds, options, inner[number], price, outside) if len(kinds) > 1 else None
        if joints is not None:
            found.append((kinds, tuple(joints)))
            within.update(inner[number])
        else:
            found += [((kind,), tuple((option,) for option in options[kind])) for kind in kinds]
    members, joints_ = zip(*found, strict=True)
    place = {kind: (unit, at) for unit, kinds in enumerate(members) for at, kind in enumerate(kinds)}
    return Units(members, joints_, place, frozenset(within))


def _groups(classes: Classes, flows: Flows) -> list[tuple[int, ...]]:
    """Classes that go together if they can, in an order in which they can run."""
    leaving: dict[tuple[int, int], set[Edge]] = defaultdict(set)
    for edge in flows.example:
        leaving[edge.maker, edge.output].add(edge)
    parent = list(range(len(classes.first)))

    def root(kind: int) -> int:
        while parent[kind] != kind:
            parent[kind] = parent[parent[kind]]
            kind = parent[kind]
        return kind

    for (maker, output), edges in leaving.items():
        if len(edges) == 1 or _updates(classes, maker):
            for edge in edges:
                if _follows(classes, maker, output, edge):
                    parent[root(maker)] = root(edge.user)
    members: dict[int, list[int]] = defaultdict(list)
    for kind in range(len(classes.first)):
        members[root(kind)].append(kind)
    return list(map(tuple, members.values()))


def _updates(classes: Classes, kind: int) -> bool:
    member = classes.first[kind]
    return isinstance(member, Node) and member.phase == Phase.UPDATE


def _follows(classes: Classes, maker: int, output: int, edge: Edge) -> bool:
    """Whether the maker of a value goes as the user does."""
    if edge.slot < 0 or classes.count[maker] != classes.count[edge.user]:
        return False
    one, other = classes.first[maker], classes.first[edge.user]
    if not isinstance(one, Node) or not isinstance(other, Node) or one.phase != other.phase:
        return False
    return light(one) and len(one.outputs) == 1 and bool(one.inputs) and bool(one.outputs[output].shape)


def join(
    kinds: Sequence[int],
    options: Mapping[int, Sequence[Option]],
    edges: Sequence[Edge],
    price: Price,
    outside: Mapping[int, tuple[set[int], set[int]]],
) -> list[Joint] | None:
    """The options of a unit: members' options that agree along the edges within it.

    Args:
        kinds: members, in an order in which they can run.
        options: of each member.
        edges: within the unit.
        price: of an option of a member.
        outside: of each member, which inputs come from outside and which outputs go there.

    Returns:
        The joint options, or None if there would be too many.

    """
    found = _join(kinds, options, edges, price, outside, 2 * _MOST)
    if found is not None:
        return found
    whole = {kind: [option for option in options[kind] if not _partial(option)] for kind in kinds}
    return _join(kinds, whole, edges, price, outside, 16 * _MOST)


def _join(
    kinds: Sequence[int],
    options: Mapping[int, Sequence[Option]],
    edges: Sequence[Edge],
    price: Price,
    outside: Mapping[int, tuple[set[int], set[int]]],
    most: int,
) -> list[Joint] | None:
    partial: dict[_Key, tuple[float, Joint]] = {((), ()): (0.0, ())}
    at = {kind: number for number, kind in enumerate(kinds)}
    for number, kind in enumerate(kinds):
        incoming = [(at[edge.maker], edge) for edge in edges if edge.user == kind]
        open_ = sorted({(at[edge.maker], edge.output) for edge in edges if at[edge.maker] <= number < at[edge.user]})
        by_inputs: dict[tuple[Placements, ...], list[tuple[float, Option]]] = defaultdict(list)
        for option in options[kind]:
            by_inputs[tuple(_taken(option, edge) for _, edge in incoming)].append((price(kind, option), option))
        grown: dict[_Key, tuple[float, Joint]] = {}
        for (seen, _), (cost, joint) in partial.items():
            for added, option in by_inputs.get(tuple(_made(joint[maker], edge.output) for maker, edge in incoming), ()):
                extended, total = (*joint, option), cost + added
                ends = tuple(_made(extended[maker], output) for maker, output in open_)
                key = ((*seen, *_shown(option, outside[kind])), ends)
                if key not in grown or total < grown[key][0]:
                    grown[key] = (total, extended)
        partial = grown
        if len(partial) > most:
            return None
    return [joint for _, joint in partial.values()] if 0 < len(partial) <= _MOST else None


def _partial(option: Option) -> bool:
    if not isinstance(option, Sharding):
        return False
    return any(isinstance(p, Partial) for placed in (*option.inputs, *option.outputs) for p in placed)


def _made(option: Option, output: int) -> Placements:
    assert isinstance(option, Sharding)
    return option.outputs[output]


def _taken(option: Option, edge: Edge) -> Placements:
    assert isinstance(option, Sharding)
    return option.inputs[edge.slot]


def _shown(option: Option, outside: tuple[set[int], set[int]]) -> tuple[Placements, ...]:
    """What of a member's option is seen from outside its unit."""
    assert isinstance(option, Sharding)
    inputs, outputs = outside
    return (*(option.inputs[slot] for slot in sorted(inputs)), *(option.outputs[at] for at in sorted(outputs)))
