"""The collective operations as values: what the members call, apart from how it is run.

`calls` makes them from its callers' arguments; `lanes` queues them; `group` runs them.
"""

from collectives.operations.base import Call, Operation, Plan, View
from collectives.operations.coalesced import AllGatherCoalesced, AllReduceCoalesced, ReduceScatterCoalesced
from collectives.operations.exchanges import AllToAll, Exchange, Redistribute
from collectives.operations.gathers import AllGather, Gather
from collectives.operations.reductions import AllReduce, Reduce, ReduceScatter, ReduceScatterV
from collectives.operations.rooted import Barrier, Broadcast, Scatter
from collectives.operations.sparse import AllReduceSparse
from collectives.operations.uneven import AllGatherV, AllToAllV

__all__ = [
    "AllGather",
    "AllGatherCoalesced",
    "AllGatherV",
    "AllReduce",
    "AllReduceCoalesced",
    "AllReduceSparse",
    "AllToAll",
    "AllToAllV",
    "Barrier",
    "Broadcast",
    "Call",
    "Exchange",
    "Gather",
    "Operation",
    "Plan",
    "Redistribute",
    "Reduce",
    "ReduceScatter",
    "ReduceScatterCoalesced",
    "ReduceScatterV",
    "Scatter",
    "View",
]
