"""What a step's parts cost under a placement: seconds of operations and reshards, bytes of shards.

Operations by roofline (Williams et al., CACM 2009): as long as their FLOPs or their bytes take, whichever is more.
Communication by Hockney's model along each axis of the mesh. `parallel.program` makes an objective of it.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from collectives.errors import UsageError
from collectives.topology import Link
from parallel.boxing import Boxing, boxing
from parallel.carry import refreshing
from parallel.graph import KEPT, Input, Node, Value
from parallel.layout import Flat, Layout, Mesh, Split
from parallel.machine import Machine
from parallel.plans import Placements, Plan, Sharding

NO_WORK = (
    "aten.view.",
    "aten.reshape.",
    "aten.permute.",
    "aten.expand.",
    "aten.slice.",
    "aten.unsqueeze.",
    "aten.squeeze.",
)
"""Operations that only look at memory in another way."""
ATTENTION = "scaled_dot_product"
_NOTHING = Boxing("none", (), 0, 0)
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Costs on a mesh of ranks of a machine; with second copies of what a rank holds alone, if `redundancy` is 1."""

    mesh: Mesh
    machine: Machine
    redundancy: int = 0

    def operation(self, node: Node, sharding: Sharding) -> float:
        """Seconds of a node on the rank that has the most to do."""
        if node.op.startswith(NO_WORK):
            return 0.0
        machine = self.machine
        moved = sum(
            self.local_bytes(value, placed)
            for value, placed in zip((*node.inputs, *node.outputs), (*sharding.inputs, *sharding.outputs), strict=True)
        )
        work = flops(node)
        if not work:
            return machine.kernel + moved / machine.bandwidth
        placed = (*sharding.inputs, *sharding.outputs)
        for axis, size in enumerate(self.mesh.shape):
            if any(isinstance(placements[axis], Split | Flat) for placements in placed):
                work /= size
        return machine.kernel + max(work / machine.rate(node.inputs[0].dtype.itemsize), moved / machine.bandwidth)

    def reshard(self, value: Value, change: Boxing) -> float:
        """Seconds of a change of placement of a value."""
        if not change.elements:
            return 0.0
        link = self.link(change.axes)
        sent = change.elements * value.dtype.itemsize / self.mesh.size
        return change.launches * self.machine.launch + change.steps * link.latency + sent / link.bandwidth

    def parts(self, plan: Plan) -> tuple[float, float, float]:
        """Seconds of a plan: of operations, of reshards, of second copies. UsageError: a reshard is not possible."""
        pairs = zip(plan.graph.nodes, plan.nodes, strict=True)
        compute = sum(self.operation(node, sharding) for node, sharding in pairs)
        talk = sum(self.reshard(reshard.value, reshard.boxing) for reshard in plan.reshards)
        copying = sum(self.refresh(copy.source, copy.layout.placements) for copy in plan.replicas if copy.changed)
        return compute, talk, copying

    def refresh(self, source: Input, placed: Placements) -> float:
        """Seconds of bringing the second copy of an input up to date."""
        found = self._copied(source, placed)
        return 0.0 if found is None else self.reshard(source.value, found)

    def copy_bytes(self, source: Input, placed: Placements) -> int:
        """Bytes of the second copy of an input on the rank that holds the most of it."""
        return 0 if self._copied(source, placed) is None else self.local_bytes(source.value, placed)

    def _copied(self, source: Input, placed: Placements) -> Boxing | None:
        if not self.redundancy or source.role not in KEPT:
            return None
        return refreshing(Layout(self.mesh, placed), source.value.shape)

    def change(self, shape: tuple[int, ...], before: Placements, after: Placements) -> Boxing | None:
        """What a reshard moves; None if it is not possible."""
        return _change(self.mesh, shape, before, after)

    def prices(self, value: Value, made: tuple[Placements, ...], wanted: tuple[Placements, ...]) -> Vector:
        """Seconds of each change of a value, from each placement to each: infinite where it is not possible."""
        fixed, moved = _prices(self, value.shape, made, wanted)
        return fixed + moved * value.dtype.itemsize

    def local_bytes(self, value: Value, placed: Placements) -> int:
        """Bytes of a value on the rank that holds the most of it."""
        return local_size(value.shape, placed, self.mesh.shape) * value.dtype.itemsize

    def link(self, axes: tuple[str, ...]) -> Link:
        """The slowest link along some axes."""
        if axes not in self._links:
            self._links[axes] = self.machine.link(self.mesh, axes)
        return self._links[axes]

    @cached_property
    def _links(self) -> dict[tuple[str, ...], Link]:
        return {}

    @cached_property
    def everywhere(self) -> Placements:
        """Whole on every rank."""
        return Layout.replicated(self.mesh).placements


@lru_cache(maxsize=1 << 12)
def _prices(
    costs: Costs, shape: tuple[int, ...], made: tuple[Placements, ...], wanted: tuple[Placements, ...]
) -> tuple[Vector, Vector]:
    """Seconds of each change, and seconds that each byte of an element adds."""
    fixed, moved = np.zeros((len(made), len(wanted))), np.zeros((len(made), len(wanted)))
    for i, before in enumerate(made):
        for j, after in enumerate(wanted):
            change = None if before != after else _NOTHING
            change = change or costs.change(shape, before, after)
            if change is None:
                fixed[i, j] = np.inf
            elif change.elements:
                link = costs.link(change.axes)
                fixed[i, j] = change.launches * costs.machine.launch + change.steps * link.latency
                moved[i, j] = change.elements / costs.mesh.size / link.bandwidth
    return fixed, moved


@lru_cache(maxsize=1 << 18)
def local_size(shape: tuple[int, ...], placed: Placements, sizes: tuple[int, ...]) -> int:
    """Elements of the largest shard, which is the first: splits are balanced, the remainder to the first ranks."""
    extents, flat = list(shape), 1
    for placement, parts in zip(placed, sizes, strict=True):
        if isinstance(placement, Split):
            extents[placement.dim] = -(-extents[placement.dim] // parts)
        elif isinstance(placement, Flat):
            flat *= parts
    return -(-math.prod(extents) // flat)


@lru_cache(maxsize=1 << 20)
def _change(mesh: Mesh, shape: tuple[int, ...], before: Placements, after: Placements) -> Boxing | None:
    """`boxing` of a small shape like this one: shapes that differ in what does not matter share one answer.

    Dimensions that neither side splits are one; where the mesh divides a dimension, what is sent grows with it.
    """
    dims = sorted({placement.dim for placement in before + after if isinstance(placement, Split)})
    if any(dim >= len(shape) for dim in dims):
        return None
    small = [mesh.size if shape[dim] and shape[dim] % mesh.size == 0 else shape[dim] for dim in dims]
    found = _boxing(mesh, tuple(small), _renumbered(before, dims), _renumbered(after, dims))
    if found is None or not found.elements:
        return found
    return replace(found, elements=found.elements * (math.prod(shape) // math.prod(small)))


def _renumbered(placed: Placements, dims: list[int]) -> Placements:
    return tuple(Split(dims.index(p.dim)) if isinstance(p, Split) else p for p in placed)


@lru_cache(maxsize=1 << 16)
def _boxing(mesh: Mesh, shape: tuple[int, ...], before: Placements, after: Placements) -> Boxing | None:
    try:
        return boxing(Layout(mesh, before), Layout(mesh, after), shape)
    except UsageError:
        return None


def flops(node: Node) -> float:
    """FLOPs of an operation on whole tensors; 0 for those that memory limits."""
    if node.op == "aten.einsum.default":
        equation, operands = node.args[0], node.inputs
        letters: dict[str, int] = {}
        terms = str(equation).partition("->")[0].split(",")
        for term, value in zip(terms, operands, strict=True):
            letters.update(zip(term, value.shape, strict=True))
        return 2.0 * math.prod(letters.values())
    if ATTENTION in node.op:
        # q is (batch, heads, queries, width), k the same with keys for queries. Backward: five products for two.
        query, key = node.inputs[1:3] if "backward" in node.op else node.inputs[:2]
        scores = math.prod(query.shape[:-1]) * key.shape[-2]
        return (10.0 if "backward" in node.op else 4.0) * scores * query.shape[-1]
    if "convolution" in node.op:
        weight = next((v for v in reversed(node.inputs) if len(v.shape) > 2), node.inputs[0])
        made = node.inputs[0] if "backward" in node.op else node.outputs[0]
        each = 2.0 * math.prod(made.shape) * math.prod(weight.shape[1:])
        return (2.0 if "backward" in node.op else 1.0) * each
    return 0.0
