"""Several reshards as one schedule: what they send is the same, and it takes one operation.

Called by `parallel.executing`, and by `parallel.carry` for second copies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.schedule import Schedule
from parallel.resharding import Reshard, schedule_of

SMALL = 2**20
"""Bytes of a tensor up to which it shares an operation with others: a copy costs less than another operation."""


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


def alike(changes: Sequence[Reshard], dtypes: Sequence[torch.dtype]) -> list[list[int]]:
    """Which reshards to run as one, by their numbers: small ones that send something, of one dtype and reduction."""
    apart, together = list[list[int]](), dict[tuple[torch.dtype, str], list[int]]()
    for number, (change, dtype) in enumerate(zip(changes, dtypes, strict=True)):
        if change.local or math.prod(change.shape) * dtype.itemsize > SMALL:
            apart.append([number])
        else:
            together.setdefault((dtype, change.combining), []).append(number)
    return [*apart, *together.values()]
