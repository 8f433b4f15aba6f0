"""Several reshards as one schedule: what they send is the same, and it takes one operation. Called by `execute`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.schedule import Schedule
from parallel.resharding import Reshard, schedule_of


@dataclass(frozen=True, eq=False)
class Bundle:
    """Reshards of tensors of one dtype that combine terms in one way. Make one with `bundle`."""

    changes: tuple[Reshard, ...]
    schedule: Schedule = field(repr=False)

    def run(self, comm: Communicator, shards: Sequence[Tensor]) -> list[Tensor]:
        """Bring all tensors to their new layouts; see `Reshard.run`."""
        if len(self.changes) == 1:
            return [self.changes[0].run(comm, shards[0])]
        rank, dtype = comm.rank, shards[0].dtype
        pairs = zip(self.changes, shards, strict=True)
        values = torch.cat([change.source(rank, change.held(rank, shard), dtype) for change, shard in pairs])
        if len(self.schedule):
            outcome = comm.redistribute(self.schedule, values, op=self.changes[0].combining)
            assert outcome.result is not None
            values = outcome.result
        parts = torch.split(values, [change.wanted(rank) for change in self.changes])
        return [change.result(rank, part) for change, part in zip(self.changes, parts, strict=True)]


@lru_cache(maxsize=1024)
def bundle(changes: tuple[Reshard, ...]) -> Bundle:
    """Put reshards together; remembered.

    Raises:
        UsageError: they are of different worlds, or combine terms in different ways.

    """
    if len(changes) == 1:
        return Bundle(changes, changes[0].schedule)
    if len({(change.combining, change.schedule.world) for change in changes}) > 1:
        raise UsageError("reshards of different worlds or reductions cannot be run as one; run one after the other")
    flows = tuple(flow for change in changes for flow in change.flows)
    return Bundle(changes, schedule_of(flows, changes[0].schedule.world))
