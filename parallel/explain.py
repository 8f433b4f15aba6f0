"""Plans in words and numbers: names that people know tensors by, repeated layers folded, totals by phase.

Called by `Plan.explain`, `Plan.to_json` and `ringhold plan`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parallel.cost import local_size
from parallel.graph import Graph, Role, layer_of
from parallel.plans import Placements, Plan, Reshard

ROLES = {Role.GRADIENT: "gradient of ", Role.PARAMETER: "new ", Role.STATE: "new ", Role.BUFFER: "new "}


def labels(graph: Graph) -> dict[str, str]:
    """A name for each value of a graph: the user's where there is one, else its module and its node."""
    found = {}
    for node in graph.nodes:
        for value in node.outputs:
            found[value.name] = f"{node.module}: {value.name}" if node.module else value.name
    for output in reversed(graph.outputs):
        found[output.value.name] = ROLES.get(output.role, "") + (output.name or str(output.role))
    found.update((source.value.name, source.name) for source in graph.inputs)
    return found


def folded(name: str) -> str:
    """A name with the number of its layer left out: `layers.*.attention` of `layers.3.attention`."""
    layer = layer_of(name.partition(":")[0].removeprefix("gradient of ").removeprefix("new "))
    if layer is None:
        return name
    return name.replace(f"{layer[0]}.{layer[1]}", f"{layer[0]}.*", 1)


def written(placed: Placements) -> str:
    """Placements as `S(0),B`."""
    return ",".join(map(str, placed))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives that are alike, of all layers of a stack or of one tensor."""

    label: str
    kind: str
    phase: str
    axes: tuple[str, ...]
    change: str
    count: int
    nbytes: int


def traffic(plan: Plan, of: Iterable[Reshard]) -> list[Traffic]:
    """Collectives folded over layers, in order of their first."""
    names = labels(plan.graph)
    groups: dict[tuple[Any, ...], list[Reshard]] = defaultdict(list)
    for reshard in of:
        change = f"{written(reshard.before.placements)} -> {written(reshard.after.placements)}"
        label = _without_number(folded(names[reshard.value.name]))
        groups[label, reshard.boxing.kind, str(reshard.phase), reshard.boxing.axes, change, reshard.nbytes].append(
            reshard
        )
    return [
        Traffic(label, kind, phase, axes, change, len(members), sum(reshard.nbytes for reshard in members))
        for (label, kind, phase, axes, change, _), members in groups.items()
    ]


def _without_number(label: str) -> str:
    """A label of a node of a layer without the node's number, which differs from layer to layer."""
    if "*" not in label or ":" not in label:
        return label
    module, _, node = label.partition(": ")
    return f"{module}: {'_'.join(part for part in node.split('_') if not part.isdecimal())}"


def places(plan: Plan, roles: frozenset[Role]) -> list[tuple[str, Placements, int, int]]:
    """Inputs of some roles, folded over layers: name, placements, how many, bytes of all of them."""
    sizes: Counter[tuple[str, Placements]] = Counter()
    counts: Counter[tuple[str, Placements]] = Counter()
    for source, placed in zip(plan.graph.inputs, plan.starts, strict=True):
        if source.role in roles:
            sizes[folded(source.name), placed] += source.value.nbytes
            counts[folded(source.name), placed] += 1
    return [(name, placed, counts[name, placed], sizes[name, placed]) for name, placed in sizes]


def copied(plan: Plan) -> int:
    """Bytes of second copies on the rank that holds the most of them."""
    costs = ((local_size(c.source.value.shape, c.layout.placements, plan.mesh.shape), c) for c in plan.replicas)
    return sum(size * copy.source.value.dtype.itemsize for size, copy in costs)


def to_json(plan: Plan) -> dict[str, Any]:
    """As JSON values; bytes are those that all ranks together send."""
    names = labels(plan.graph)
    loss = [r for r in plan.collectives if not r.value.shape]
    others = [r for r in plan.collectives if r.value.shape]

    def collective(reshard: Reshard) -> dict[str, Any]:
        return {
            "tensor": names[reshard.value.name],
            "shape": list(reshard.value.shape),
            "kind": reshard.boxing.kind,
            "phase": str(reshard.phase),
            "mesh_axis": ",".join(reshard.boxing.axes),
            "from": written(reshard.before.placements),
            "to": written(reshard.after.placements),
            "bytes": reshard.nbytes,
            "tensor_bytes": reshard.value.nbytes,
        }

    gradients = [output for output in plan.graph.outputs if output.role == Role.GRADIENT]
    report: dict[str, Any] = {
        "mesh": dict(plan.mesh.axes),
        "placements": {name: list(map(str, layout.placements)) for name, layout in plan.layouts.items()},
        "gradients": {output.name: list(map(str, plan.made[output.value.name])) for output in gradients},
        "collectives": [collective(reshard) for reshard in others],
        "loss": [collective(reshard) for reshard in loss],
        "total_bytes": sum(reshard.nbytes for reshard in others),
        "loss_bytes": sum(reshard.nbytes for reshard in loss),
        "launches": len(plan.collectives),
    }
    if plan.redundancy:
        report["second_copies"] = {
            "tensors": [copy.source.name for copy in plan.replicas],
            "bytes": sum(copy.nbytes for copy in plan.replicas),
            "memory": copied(plan),
        }
    if plan.figures is not None:
        figures = plan.figures
        report |= {
            "machine": figures.machine,
            "time": figures.time,
            "compute_time": figures.compute,
            "communication_time": figures.communication,
            "copying_time": figures.copying,
            "memory": figures.memory,
            "memory_at_peak": figures.at_peak,
            "optimality_gap": figures.gap,
            "lower_bound": figures.bound,
            "optimality": optimality(plan),
        }
    return report


def optimality(plan: Plan) -> str:
    """What is proven of a plan, in words."""
    figures = plan.figures
    if figures is None:
        return "nothing is proven: the plan does not come from the planner"
    problem = "with equal layers planned alike" if figures.tied else "with every layer planned by itself"
    how = "the linear relaxation is integral" if figures.relaxed else "branch and bound"
    if figures.by_axis:
        return (
            f"at most {figures.gap:.2%} slower than the best for this cost model, {problem} (found along one axis of "
            f"the mesh at a time; dual bound of all plans)"
        )
    if figures.gap < 1e-6:
        return f"optimal for this cost model, {problem} ({how})"
    return f"at most {figures.gap:.2%} slower than the best for this cost model, {problem} ({how})"
