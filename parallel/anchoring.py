"""Values that are compared with each other have the same bits wherever they are.

Used by `parallel.lowering`. Partial sums that become whole and partial sums that become split are added up in other
orders, so that two copies of one value may differ in the last bit. Most operations do not mind; where the largest
element of `x` is found and the elements of `x` that equal it are looked for, none may be found, and a gradient is 0/0.
So floating-point values that one comparison takes together are anchored: what made them may leave partial sums, but
every user takes the sum, by way of an `alias`, whose signatures have none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from parallel.graph import Argument, Node, Value

ALIAS = "aten.alias.default"
_COMPARISONS = frozenset(f"aten.{name}.Tensor" for name in ("eq", "ne", "lt", "le", "gt", "ge"))


def anchor(nodes: Sequence[Node]) -> tuple[list[Node], dict[str, Value]]:
    """Return the nodes with aliases put in, and the values that took the places of others, by name."""
    compared = {value.name for node in nodes if node.op in _COMPARISONS for value in _sums(node)}
    now: dict[str, Value] = {}
    return list(_anchored(nodes, compared, now)), now


def _sums(node: Node) -> Iterator[Value]:
    """What a comparison of two tensors of floats takes."""
    if len(node.inputs) == 2 and all(value.dtype.is_floating_point for value in node.inputs):
        yield from node.inputs


def _anchored(nodes: Sequence[Node], compared: set[str], now: dict[str, Value]) -> Iterator[Node]:
    for node in nodes:
        kwargs = tuple((name, _renewed(arg, now)) for name, arg in node.kwargs)
        yield replace(node, args=tuple(_renewed(arg, now) for arg in node.args), kwargs=kwargs)
        for value in node.outputs:
            if value.name in compared:
                name = f"{value.name}_anchored"
                now[value.name] = replace(value, name=name)
                yield Node(name, ALIAS, (value,), (), (now[value.name],), (), node.phase, node.module)


def _renewed(arg: Argument, now: dict[str, Value]) -> Argument:
    if isinstance(arg, Value):
        return now.get(arg.name, arg)
    return tuple(_renewed(part, now) for part in arg) if isinstance(arg, tuple) else arg
