"""What the parts of one layer cost on a device of a cluster, for the integer program of `parallel.stages`.

The kernels are those of `parallel.scale`, so that the program and the formulas mean the same by a second: products by
their local shape, attention by its share of heads or samples, all else by the memory that fused kernels touch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from collectives.topology import Link
from parallel.cost import ATTENTION, NO_WORK, Costs
from parallel.graph import Graph, Node, Phase
from parallel.layout import Mesh, Split
from parallel.machine import Machine
from parallel.plans import Placements, Sharding
from parallel.scale.cluster import Cluster
from parallel.scale.kernels import Kernels

_PRODUCT = "aten.einsum."
_SPREAD = "aten.expand."
"""Makes nothing in memory: what takes its result reads the small tensor."""


@dataclass(frozen=True, eq=False)
class StageCosts(Costs):
    """Costs of a layer's operations. Equal to others of the same mesh and machine: changes of placement cost the same.

    Attributes:
        kernels: of the device.
        attention: seconds of attention, forward and backward, on a rank that has an even share of it.
        kept: tensors that fused kernels do not read or write in memory: by node, and place among inputs and outputs.

    """

    kernels: Kernels | None = None
    attention: tuple[float, float] = (0.0, 0.0)
    kept: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def of(
        cls, graph: Graph, mesh: Mesh, cluster: Cluster, kernels: Kernels, attention: tuple[float, float]
    ) -> "StageCosts":
        """Costs of a graph on a mesh of ranks of one node; of its communication as much as does not hide."""
        machine = Machine.of_cluster(cluster)
        exposed = max(1.0 - cluster.tp_overlap, 1e-6)
        near, far = (Link(link.latency * exposed, link.bandwidth / exposed) for link in (machine.near, machine.far))
        machine = msgspec.structs.replace(machine, near=near, far=far, launch=0.0)
        return cls(mesh, machine, kernels=kernels, attention=attention, kept=_kept(graph))

    def operation(self, node: Node, sharding: Sharding) -> float:
        """Seconds of a node on the rank that has the most to do."""
        assert self.kernels is not None
        if node.op.startswith(NO_WORK):
            return 0.0
        if node.op.startswith(_PRODUCT):
            return self.kernels.product(*_shape(node, sharding, self.mesh))
        if ATTENTION in node.op:
            work = float(self.mesh.size)
            for axis, size in enumerate(self.mesh.shape):
                if any(isinstance(placed[axis], Split) for placed in sharding.inputs):
                    work /= size
            return self.attention[node.phase == Phase.BACKWARD] * work
        tensors = zip((*node.inputs, *node.outputs), (*sharding.inputs, *sharding.outputs), strict=True)
        moved = sum(
            self.local_bytes(value, placed)
            for at, (value, placed) in enumerate(tensors)
            if (node.name, at) not in self.kept
        )
        return self.kernels.memory(moved)


def _shape(node: Node, sharding: Sharding, mesh: Mesh) -> tuple[int, int, int, int]:
    """Local rows, columns and inner dimension of an einsum of two operands, and how many products it is."""
    terms, _, result = str(node.args[0]).partition("->")
    left, right = terms.split(",")
    extents: dict[str, int] = {}
    parts: dict[str, dict[int, int]] = {}
    operands: list[tuple[str, tuple[int, ...], Placements]] = [
        (term, value.shape, placed)
        for term, value, placed in zip((left, right), node.inputs, sharding.inputs, strict=True)
    ]
    for term, shape, placed in (*operands, (result, node.outputs[0].shape, sharding.outputs[0])):
        extents.update(zip(term, shape, strict=True))
        for axis, placement in enumerate(placed):
            if isinstance(placement, Split):
                parts.setdefault(term[placement.dim], {})[axis] = mesh.shape[axis]

    def local(letters: set[str]) -> int:
        return math.prod(-(-extents[letter] // math.prod(parts.get(letter, {}).values())) for letter in letters)

    both = set(left) & set(right)
    inner = both - set(result)
    return local(set(left) - both), local(set(right) - both), local(inner), local(both - inner)


def _kept(graph: Graph) -> frozenset[tuple[str, int]]:
    """What kernels that fuse neighbouring operations keep out of memory.

    A value stays out if only fusible operations make and take it; the backward pass computes it again. A value in
    memory is read once by the operations of one module in one phase.
    """
    roots = _roots(graph)
    fusible = {node.name for node in graph.nodes if _fusible(node)}
    outputs = {roots[output.value.name] for output in graph.outputs}
    written = {
        name
        for node in graph.nodes
        if node.name not in fusible and not node.op.startswith(NO_WORK)
        for name in (*(roots[value.name] for value in node.inputs), *(value.name for value in node.outputs))
    } | outputs
    written |= {source.value.name for source in graph.inputs}
    spread = {value.name for node in graph.nodes if node.op.startswith(_SPREAD) for value in node.outputs}
    found: set[tuple[str, int]] = set()
    read: set[tuple[str, str, Phase]] = set()
    for node in graph.nodes:
        if node.name not in fusible:
            continue
        for at, value in enumerate((*node.inputs, *node.outputs)):
            name = roots[value.name]
            seen = (name, node.module, node.phase)
            if name not in written or value.name in spread or (at < len(node.inputs) and seen in read):
                found.add((node.name, at))
            read.add(seen)
    return frozenset(found)


def _fusible(node: Node) -> bool:
    return not (node.op.startswith((*NO_WORK, _PRODUCT)) or ATTENTION in node.op)


def _roots(graph: Graph) -> Mapping[str, str]:
    """The value whose memory each value looks at: itself, unless it is a view."""
    roots = {source.value.name: source.value.name for source in graph.inputs}
    for node in graph.nodes:
        for value in node.outputs:
            view = node.op.startswith(NO_WORK) and node.inputs
            roots[value.name] = roots[node.inputs[0].name] if view else value.name
    return roots
