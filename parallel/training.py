"""Training by plan, through the loss of members: the state is sharded as planned, and re-planned for who is left.

    training = Training(comm, planner, state)          # planner: mesh -> Plan; state: whole tensors by name
    results = training.step({"batch.0": ..., "lr.0": ...})

A step counts for everybody or for nobody: the graph changes nothing in place, and every operation of it ends alike on
all survivors. When one raises `MemberLost`, the survivors plan anew for a mesh of themselves, carry the state over
(`parallel.carry`) and repeat the step. Called by `launch.planned`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import MemberLost
from parallel.carry import Replicas, carry, only_in_copies
from parallel.executing import Executor, Results, shards_of
from parallel.graph import KEPT
from parallel.layout import Layout
from parallel.plans import Plan
from parallel.resharding import reshard

Planner = Callable[[int], Plan]
"""Number of ranks to a plan for a mesh of them; the same on all of them."""


@dataclass(frozen=True)
class _Epoch:
    """Who shares the state, how, and this rank's part of it; replaced as a whole."""

    members: tuple[int, ...]
    executor: Executor
    state: dict[str, Tensor]
    replicas: Replicas

    @property
    def layouts(self) -> dict[str, Layout]:
        """Where the state is."""
        return {name: layout for name, layout in self.executor.plan.layouts.items() if name in self.state}


class Training:
    """A training run of one member.

    Args:
        comm: the run's members; all of them make the same `Training`.
        planner: asked at the start and after each loss.
        state: every parameter, buffer and optimizer state by the user's names, whole, the same on all.
        redundancy: 1 keeps a second copy of what a rank holds alone on another; 0 keeps none.

    """

    def __init__(self, comm: Communicator, planner: Planner, state: Mapping[str, Tensor], redundancy: int = 0) -> None:
        self.comm, self.planner, self.redundancy = comm, planner, redundancy
        self.from_copies: tuple[str, ...] = ()
        """Tensors that the last loss left parts of in second copies alone."""
        self._epoch = self._founded(state)

    @property
    def plan(self) -> Plan:
        """What is run now."""
        return self._epoch.executor.plan

    @property
    def members(self) -> tuple[int, ...]:
        """Ids of the members that share the state now, by rank."""
        return self._epoch.members

    def step(self, given: Mapping[str, Tensor]) -> Results:
        """Take one step, repeated for the survivors if members are lost.

        Args:
            given: the batch and the learning rates by the user's names: whole, the same on all.

        Returns:
            This rank's part of the outputs, in `plan.ends`; the loss whole.

        Raises:
            StateLost: what only lost members held is gone: read the last checkpoint.

        """
        while (results := self.attempt(given)) is None:
            pass
        return results

    def attempt(self, given: Mapping[str, Tensor]) -> Results | None:
        """Try a step once, as `step`; None if members were lost, on every survivor alike: the state is as before."""
        try:
            if self.comm.members == self._epoch.members:
                return self._attempt(given)
        except MemberLost:
            pass
        self._epoch = self._recovered()
        return None

    def whole(self) -> dict[str, Tensor]:
        """The whole state by name, on every member; all of them call it. Members that are lost meanwhile do no harm."""
        while True:
            epoch = self._epoch
            try:
                found = {}
                for name, layout in epoch.layouts.items():
                    everywhere = Layout.replicated(layout.mesh)
                    change = reshard(layout, everywhere, self._shapes[name], self.comm.size)
                    found[name] = change.run(self.comm, epoch.state[name])
            except MemberLost:
                self._epoch = self._recovered()
            else:
                return found

    def _attempt(self, given: Mapping[str, Tensor]) -> Results:
        epoch = self._epoch
        plan = epoch.executor.plan
        results = epoch.executor.run({**epoch.state, **shards_of(plan, given, self.comm.rank)})
        ours = plan.graph.changed
        changed = {name: tensor for (role, name), tensor in results.items() if role in KEPT and name in ours}
        epoch.replicas.refresh(self.comm, changed, epoch.layouts, self._shapes)
        self._epoch = replace(epoch, state={**epoch.state, **changed})
        return results

    def _founded(self, state: Mapping[str, Tensor]) -> _Epoch:
        """The state among those who are here, each of whom has all of it."""
        while True:
            plan = self.planner(self.comm.size)
            self._shapes = {source.name: source.value.shape for source in plan.graph.inputs}
            kept = {source.name for source in plan.graph.inputs if source.role in KEPT}
            whole = {name: tensor.detach() for name, tensor in state.items() if name in kept}
            shards = {name: shard.clone() for name, shard in shards_of(plan, whole, self.comm.rank).items()}
            try:
                return _Epoch(self.comm.members, Executor(plan, self.comm), shards, self._replicas(plan, shards))
            except MemberLost:
                continue

    def _recovered(self) -> _Epoch:
        """The state among the survivors, however many more are lost meanwhile."""
        while True:
            try:
                return self._carried()
            except MemberLost:
                continue

    def _carried(self) -> _Epoch:
        """The state in the layouts of a plan for the members of now."""
        old, plan = self._epoch, self.planner(self.comm.size)
        layouts = {name: plan.layouts[name] for name in old.state}
        state = carry(old.state, old.layouts, layouts, self._shapes, old.members, self.comm, old.replicas)
        epoch = _Epoch(self.comm.members, Executor(plan, self.comm), state, self._replicas(plan, state))
        self.from_copies = only_in_copies(old.layouts, self._shapes, old.members, self.comm)
        return epoch

    @torch.no_grad()
    def _replicas(self, plan: Plan, state: Mapping[str, Tensor]) -> Replicas:
        """Second copies of a state that nobody relies on yet."""
        if not self.redundancy:
            return Replicas()
        layouts = {name: plan.layouts[name] for name in state}
        replicas = Replicas.of(layouts, self._shapes)
        replicas.refresh(self.comm, state, layouts, self._shapes)
        return replicas
