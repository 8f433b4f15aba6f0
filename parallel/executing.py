"""A planned step, run on the ranks of a communicator: `ringhold plan` says what, this does it.

    executor = Executor(plan, comm)           # or execute(plan, comm, inputs), once, from whole tensors
    results = executor.run(shards)            # this rank's part of every input, by the user's names
    loss = results[Role.LOSS, "loss"]

Each node runs on local shards as `parallel.signatures` says; a value that is wanted in another placement than it was
made in is resharded, once for each placement. The bytes that this takes are those of the plan, to the last one. The
graph changes nothing in place, so a step that lost a member has left its inputs as they were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import LayoutMismatch, UsageError
from parallel.bundle import alike, bundle
from parallel.graph import Node, Phase, Role, Value
from parallel.layout import Broadcast, Layout
from parallel.plans import Placements, Plan, Sharding
from parallel.resharding import Reshard, reshard
from parallel.signatures import Signature, localize

_NOTHING = torch.empty(0)
"""In the place of a tensor that is not there yet, or not needed any more."""
_Key: TypeAlias = tuple[str, Placements]
"""A value of the graph in certain placements."""
Results: TypeAlias = dict[tuple[Role, str], Tensor]


def shard_of(tensor: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's part of a tensor that is all there, as a view where it is a box."""
    shard = layout.shard(tuple(tensor.shape), rank)
    if shard.whole:
        box = shard.box
        return tensor[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]
    flat = tensor.reshape(-1)
    return torch.cat([flat[start:stop] for start, stop in shard.runs(tuple(tensor.shape))])


def shards_of(plan: Plan, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A rank's part of whole tensors, by the names of the plan's inputs; names that are none are left out."""
    layouts = plan.layouts
    return {name: shard_of(tensor, layouts[name], rank) for name, tensor in tensors.items() if name in layouts}


def execute(plan: Plan, comm: Communicator, inputs: Mapping[str, Tensor]) -> Results:
    """Run a planned step once from whole tensors, which every rank has; see `Executor`, which runs it again and again.

    Args:
        plan: on a mesh of the communicator's ranks.
        comm: every member calls it.
        inputs: every input of the step but constants, by the user's names.

    Returns:
        This rank's part of each output, in the placements `plan.ends`, by role and name.

    """
    return Executor(plan, comm).run(shards_of(plan, inputs, comm.rank))


_Work: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class _Action:
    """An operation on local shards, or reshards that are run as one: takes tensors from places of the rank's memory,
    puts others there, and lets go of what nobody needs any more."""

    work: _Work
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Need:
    """A value that is wanted otherwise than it was made: before which node first, and after which it is there."""

    value: Value
    wanted: Placements
    at: int
    since: int
    late: bool
    """Wanted by the update or as an output, so that it may be brought together with others."""


class Executor:
    """A rank's part of a plan, ready to be run any number of times.

    Args:
        plan: on a mesh of the communicator's ranks.
        comm: its members run the same plan.

    Raises:
        UsageError: the mesh is not one of the communicator's ranks.

    """

    def __init__(self, plan: Plan, comm: Communicator) -> None:
        if sorted(plan.mesh.ranks) != list(range(comm.size)):
            raise UsageError(
                f"the plan is for mesh {plan.mesh} of ranks {list(plan.mesh.ranks)}, but the communicator has ranks "
                f"0 to {comm.size - 1}; plan for a mesh of all of them"
            )
        self.plan = plan
        self._comm = comm
        self._places: dict[_Key, int] = {}
        self._needs = list(_needs(plan))
        self._steps = [(action.work, action.takes, action.gives, action.frees) for action in self._compile()]
        self._given = [
            self._at(source.value, start) for source, start in zip(plan.graph.inputs, plan.starts, strict=True)
        ]
        outputs = zip(plan.graph.outputs, plan.ends, strict=True)
        self._results = {(out.role, out.name): self._at(out.value, placed) for out, placed in outputs}
        constants = shards_of(plan, plan.graph.constants, comm.rank)
        self._constants = {name: tensor.contiguous() for name, tensor in constants.items()}
        self._shapes = {
            name: layout.shard(plan.graph.named[name].value.shape, comm.rank).shape
            for name, layout in plan.layouts.items()
        }

    @torch.no_grad()
    def run(self, shards: Mapping[str, Tensor]) -> Results:
        """Run the step once; every rank calls it.

        Args:
            shards: this rank's part of each input but constants, by the user's names, in the layout that
                `plan.layouts` gives it. Nothing is changed.

        Returns:
            This rank's part of each output, in the placements `plan.ends`, by role and name.

        Raises:
            UsageError: an input is missing.
            LayoutMismatch: one has another shape than the layout says.
            MemberLost: on every survivor; nothing has changed.

        """
        memory = [_NOTHING] * len(self._places)
        for source, place in zip(self.plan.graph.inputs, self._given, strict=True):
            tensor = (self._constants if source.role == Role.CONSTANT else shards).get(source.name)
            if tensor is None:
                raise UsageError(f"the step needs the {source.role} {source.name!r}; it is not among the shards")
            if tuple(tensor.shape) != self._shapes[source.name]:
                raise LayoutMismatch(
                    f"rank {self._comm.rank} needs a shard of {source.name} of shape "
                    f"{list(self._shapes[source.name])} ({self.plan.layouts[source.name]}), not {list(tensor.shape)}"
                )
            memory[place] = tensor.detach()
        for work, takes, gives, frees in self._steps:
            for place, result in zip(gives, work([memory[place] for place in takes]), strict=True):
                memory[place] = result
            for place in frees:
                memory[place] = _NOTHING
        return {key: memory[place] for key, place in self._results.items()}

    # --- compiling ---

    def _at(self, value: Value, placed: Placements) -> int:
        """The place in memory of a value in these placements."""
        return self._places.setdefault((value.name, placed), len(self._places))

    def _compile(self) -> tuple[_Action, ...]:
        plan, made = self.plan, list[_Action]()
        left, first = self._needs, {need.at for need in self._needs}
        for at in range(len(plan.graph.nodes) + 1):
            if at in first:
                late = any(need.late for need in left if need.at == at)
                now = [need for need in left if need.at == at or (late and need.late and need.since < at)]
                left = [need for need in left if need not in now]
                made += map(self._moving, _bundled(plan, self._comm.size, now))
            if at < len(plan.graph.nodes):
                made.append(self._calling(plan.graph.nodes[at], plan.nodes[at]))
        return tuple(self._freeing(made))

    def _moving(self, needs: list[_Need]) -> _Action:
        takes = tuple(self._at(need.value, self.plan.made[need.value.name]) for need in needs)
        gives = tuple(self._at(need.value, need.wanted) for need in needs)
        moved = bundle(tuple(_change(self.plan, need, self._comm.size) for need in needs))
        return _Action(partial(moved.run, self._comm), takes, gives)

    def _calling(self, node: Node, how: Sharding) -> _Action:
        function = self._local(node, how)
        takes = tuple(self._at(value, placed) for value, placed in zip(node.inputs, how.inputs, strict=True))
        gives = tuple(self._at(value, placed) for value, placed in zip(node.outputs, how.outputs, strict=True))
        return _Action(function, takes, gives)

    def _local(self, node: Node, how: Sharding) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
        """How the node runs on this rank's shards."""
        if all(p == Broadcast() for placed in (*how.inputs, *how.outputs) for p in placed):
            return node.prepared()
        signatures = [
            Signature(tuple(placed[axis] for placed in how.inputs), tuple(placed[axis] for placed in how.outputs))
            for axis in range(len(self.plan.mesh.axes))
        ]
        return localize(node, signatures, self.plan.mesh, self._comm.rank)

    def _freeing(self, made: list[_Action]) -> Iterator[_Action]:
        """The actions, each of which lets go of what none after it takes and is no output."""
        outputs = zip(self.plan.graph.outputs, self.plan.ends, strict=True)
        kept = {self._at(out.value, placed) for out, placed in outputs}
        last: dict[int, int] = {}
        for at, action in enumerate(made):
            last.update(dict.fromkeys((*action.gives, *action.takes), at))
        over: dict[int, list[int]] = {}
        for place, at in last.items():
            if place not in kept:
                over.setdefault(at, []).append(place)
        for at, action in enumerate(made):
            yield replace(action, frees=tuple(over.get(at, ())))


def _needs(plan: Plan) -> Iterator[_Need]:
    """What is to be resharded, once for each value and placement, in the order in which it is first wanted."""
    nodes, seen = plan.graph.nodes, set[_Key]()
    since = {value.name: at for at, node in enumerate(nodes) for value in node.outputs}
    wanted = [
        (value, placed, at, node.phase == Phase.UPDATE)
        for at, (node, how) in enumerate(zip(nodes, plan.nodes, strict=True))
        for value, placed in zip(node.inputs, how.inputs, strict=True)
    ]
    wanted += [(out.value, placed, len(nodes), True) for out, placed in zip(plan.graph.outputs, plan.ends, strict=True)]
    for value, placed, at, late in wanted:
        if placed != plan.made[value.name] and (value.name, placed) not in seen:
            seen.add((value.name, placed))
            yield _Need(value, placed, at, since.get(value.name, -1), late)


def _change(plan: Plan, need: _Need, world: int) -> Reshard:
    before, after = Layout(plan.mesh, plan.made[need.value.name]), Layout(plan.mesh, need.wanted)
    return reshard(before, after, need.value.shape, world)


def _bundled(plan: Plan, world: int, needs: list[_Need]) -> Iterator[list[_Need]]:
    """Which reshards are run as one."""
    changes = [_change(plan, need, world) for need in needs]
    for numbers in alike(changes, [need.value.dtype for need in needs]):
        yield [needs[number] for number in numbers]
