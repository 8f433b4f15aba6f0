"""What the planner may choose from: placements of each input of a step, and shardings of each operation.

An operation's shardings on a mesh of several axes are what its signatures along each axis give together. Called by
`parallel.program`, once for each class of tied operations.
"""

from collections.abc import Hashable, Mapping
from itertools import product

from collectives.errors import UsageError
from parallel.folding import Classes, form
from parallel.graph import Graph, Input, Node, Role
from parallel.layout import Broadcast, Mesh, Partial, Placement, Split
from parallel.plans import Option, Placements, Sharding
from parallel.signatures import signatures, together

Options = Mapping[int, tuple[Option, ...]]
"""By class."""
_WHOLE = frozenset({Role.RATE, Role.CONSTANT})
"""Roles of inputs that every rank has whole: they come with the program, not with the data."""


def of_classes(classes: Classes, mesh: Mesh, pins: Mapping[str, Placements]) -> Options:
    """Everything that may be chosen for each class. UsageError: a pin asks for a placement that cannot be."""
    known: dict[Hashable, tuple[Option, ...]] = {}
    found: dict[int, tuple[Option, ...]] = {}
    for kind, member in enumerate(classes.first):
        if isinstance(member, Input):
            found[kind] = of_input(member, mesh, pins.get(member.name))
            continue
        what = form(member)
        if what not in known:
            known[what] = of_node(member, mesh)
        found[kind] = known[what]
    return found


def of_node(node: Node, mesh: Mesh) -> tuple[Sharding, ...]:
    """Every way to run an operation on a mesh."""
    per_axis = [signatures(node, parts) for parts in mesh.shape]
    found: dict[Sharding, None] = {}
    for chosen in product(*per_axis):
        if len(chosen) > 1 and not together(node, chosen, mesh.shape):
            continue
        inputs = tuple(zip(*(signature.inputs for signature in chosen), strict=True)) if node.inputs else ()
        outputs = tuple(zip(*(signature.outputs for signature in chosen), strict=True))
        found[Sharding(inputs, outputs)] = None
    return tuple(found)


def of_input(source: Input, mesh: Mesh, pin: Placements | None = None) -> tuple[Placements, ...]:
    """Every placement in which an input may be given: whole, or split where each rank gets something.

    Raises:
        UsageError: it is pinned to a placement that it cannot have.

    """
    shape = source.value.shape
    found: list[Placements] = []
    able: list[Placement] = [Broadcast(), *map(Split, range(len(shape)))]
    for placed in product(able, repeat=len(mesh.axes)):
        if source.role in _WHOLE and any(isinstance(placement, Split) for placement in placed):
            continue
        if all(extent >= _parts(placed, mesh, dim) for dim, extent in enumerate(shape)):
            found.append(placed)
    if pin is None:
        return tuple(found)
    if pin not in found:
        wanted = ",".join(map(str, pin))
        others = " ".join(",".join(map(str, placed)) for placed in found[:12])
        raise UsageError(
            f"--pin {source.name}={wanted}: the {source.role} of shape {list(shape)} cannot be so on mesh {mesh}; "
            f"it can be {others}"
        )
    return (pin,)


def check_pins(graph: Graph, mesh: Mesh, pins: Mapping[str, Placements]) -> None:
    """Raise `UsageError` if a pin names no input of the step, or lacks placements."""
    for name, placed in pins.items():
        if name not in graph.named:
            known = ", ".join(list(graph.named)[:12])
            raise UsageError(f"--pin {name}: the step has no tensor of that name; it has {known}...")
        if len(placed) != len(mesh.axes):
            wanted = ",".join(map(str, placed))
            raise UsageError(
                f"--pin {name}={wanted}: mesh {mesh} has {len(mesh.axes)} axes and needs as many placements"
            )
        if any(isinstance(placement, Partial) for placement in placed):
            raise UsageError(f"--pin {name}: what a step is given is split or whole, not partial")


def _parts(placed: tuple[Placement, ...], mesh: Mesh, dim: int) -> int:
    """Into how many parts a dimension is cut."""
    parts = 1
    for placement, size in zip(placed, mesh.shape, strict=True):
        if isinstance(placement, Split) and placement.dim == dim:
            parts *= size
    return parts
