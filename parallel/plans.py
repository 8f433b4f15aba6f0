"""A plan: where every tensor of a training step lives, and what is communicated because of it.

`parallel.planner` makes it, the executor runs it, `ringhold plan` prints it. It says of each node in which placements
it takes its inputs and makes its outputs; where a value is made in other placements than it is wanted in, it is
resharded, once for each placement in which it is wanted, however many nodes take it so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, TypeAlias

from parallel.boxing import Boxing, boxing
from parallel.carry import refreshing
from parallel.graph import KEPT, Graph, Input, Phase, Role, Value
from parallel.layout import Layout, Mesh, Placement

Placements: TypeAlias = tuple[Placement, ...]
"""One for each axis of the mesh."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a node runs: in which placements it takes each tensor argument and makes each output."""

    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]


Option: TypeAlias = "Sharding | Placements"
"""What a planner may choose: how an operation runs, or where an input lives."""


@dataclass(frozen=True, slots=True)
class Reshard:
    """A value brought into another placement.

    Attributes:
        value: of the graph.
        before, after: its layouts.
        phase: backward for gradients of parameters, whoever wants them; else of the node that first wants it so, and of
            an output forward for the loss, update for others.
        wanted_by: name of that node, or what the output is to the user.
        boxing: what it takes.

    """

    value: Value
    before: Layout
    after: Layout
    phase: Phase
    wanted_by: str
    boxing: Boxing

    @property
    def nbytes(self) -> int:
        """Bytes that all ranks together send."""
        return self.boxing.elements * self.value.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Replica:
    """A second copy of a state that ranks hold alone, each shard on one more rank; see `parallel.carry`.

    Attributes:
        source: the parameter, buffer or optimizer state.
        layout: where it lives; the copies are of its shards.
        boxing: what it takes to bring the copies up to date.
        changed: whether a step changes it, so that they have to be.

    """

    source: Input
    layout: Layout
    boxing: Boxing
    changed: bool

    @property
    def nbytes(self) -> int:
        """Bytes that all ranks together send for it in a step."""
        return self.boxing.elements * self.source.value.dtype.itemsize if self.changed else 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a plan is predicted to take, on a machine.

    Attributes:
        compute, communication: seconds of a step.
        memory: bytes of the rank that holds the most, at its peak.
        at_peak: of these, bytes of parameters, optimizer, gradients, activations and second copies.
        gap: how far the plan may be from the best, as a share of its time: relative to the cost model, and to the
            problem in which equal layers are tied (`tied`).
        bound: seconds that no plan can be below, in the same sense; ties cost some nanoseconds there.
        relaxed: whether the linear relaxation was integral by itself, so that no search was needed.
        machine: name.
        copying: seconds of a step in which second copies are brought up to date.
        by_axis: whether it was found along one axis of the mesh at a time; the bound is a dual one, of all plans.

    """

    compute: float
    communication: float
    memory: int
    at_peak: dict[str, int]
    gap: float
    bound: float
    relaxed: bool
    tied: bool
    machine: str
    copying: float = 0.0
    by_axis: bool = False

    @property
    def time(self) -> float:
        """Seconds of a step: nothing hides behind anything."""
        return self.compute + self.communication + self.copying


@dataclass(frozen=True)
class Plan:
    """Where everything lives.

    Attributes:
        mesh: of ranks.
        graph: the step.
        starts: placements of each of `graph.inputs`.
        nodes: of each of `graph.nodes`, in the same order.
        ends: placements in which each of `graph.outputs` is left: a new parameter or state as its old value came, the
            loss on every rank, a gradient as it was made.
        figures: what the planner predicts; None for a plan that was not made by it.
        redundancy: 1 if a second copy is kept of state that a rank holds alone.

    """

    mesh: Mesh
    graph: Graph
    starts: tuple[Placements, ...]
    nodes: tuple[Sharding, ...]
    ends: tuple[Placements, ...]
    figures: Figures | None = None
    redundancy: int = 0

    @cached_property
    def made(self) -> dict[str, Placements]:
        """Placements in which each value is given or made, by its name."""
        found = {source.value.name: placed for source, placed in zip(self.graph.inputs, self.starts, strict=True)}
        for node, sharding in zip(self.graph.nodes, self.nodes, strict=True):
            found.update(zip((value.name for value in node.outputs), sharding.outputs, strict=True))
        return found

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Where each input of the step lives, by the user's name: parameters, optimizer state, batch."""
        pairs = zip(self.graph.inputs, self.starts, strict=True)
        return {source.name: Layout(self.mesh, placed) for source, placed in pairs}

    @cached_property
    def reshards(self) -> tuple[Reshard, ...]:
        """Every change of placement, in the order in which the step needs them; those that send nothing too."""
        found: dict[tuple[str, Placements], Reshard] = {}
        gradients = {output.value.name for output in self.graph.outputs if output.role == Role.GRADIENT}
        for value, wanted, user, name in self._wanted():
            made = self.made[value.name]
            if wanted == made or (value.name, wanted) in found:
                continue
            before, after = Layout(self.mesh, made), Layout(self.mesh, wanted)
            cost = boxing(before, after, value.shape)
            phase = Phase.BACKWARD if value.name in gradients else user
            found[value.name, wanted] = Reshard(value, before, after, phase, name, cost)
        return tuple(found.values())

    @property
    def collectives(self) -> tuple[Reshard, ...]:
        """The changes of placement for which something is sent."""
        return tuple(reshard for reshard in self.reshards if reshard.boxing.elements)

    @cached_property
    def replicas(self) -> tuple[Replica, ...]:
        """The second copies that are kept."""
        if not self.redundancy:
            return ()
        changed = self.graph.changed
        found = []
        for source in self.graph.inputs:
            layout = self.layouts[source.name]
            cost = refreshing(layout, source.value.shape) if source.role in KEPT else None
            if cost is not None:
                found.append(Replica(source, layout, cost, source.name in changed))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Placements by name, collectives, totals and figures as JSON values; see `parallel.explain`."""
        return import_module("parallel.explain").to_json(self)  # type: ignore[no-any-return]

    def explain(self) -> str:
        """What lives where and why it costs what it does, as text; repeated layers folded."""
        return str(import_module("parallel.tables").text(self))

    def _wanted(self) -> Iterator[tuple[Value, Placements, Phase, str]]:
        for node, sharding in zip(self.graph.nodes, self.nodes, strict=True):
            for value, placed in zip(node.inputs, sharding.inputs, strict=True):
                yield value, placed, node.phase, node.name
        for output, placed in zip(self.graph.outputs, self.ends, strict=True):
            phase = {Role.LOSS: Phase.FORWARD, Role.GRADIENT: Phase.BACKWARD}.get(output.role, Phase.UPDATE)
            yield output.value, placed, phase, f"{output.role} {output.name}".rstrip()
