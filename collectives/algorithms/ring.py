"""The ring: every rank receives from its predecessor and sends to its successor, all links at once.

Bandwidth-optimal, and the choice for large messages: an all-reduce moves `2 (world - 1) / world * count` elements out
of, and into, each rank, which is the least possible (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", JPDC 69, 2009). It pays with latency, `2 (world - 1)` steps; for small messages see
`collectives.algorithms.doubling`.

The chunk of rank `r` is part `r` of `split(count, world)`, or of parts with the lengths `counts`. `order` is the rank
at each position of the ring; it decides who is neighbour to whom, not whose chunk is which.

Schedules are remembered: the same arguments give the same object.
"""

from collectives.algorithms import rotation
from collectives.algorithms.rotation import Lane, Lengths, Order
from collectives.algorithms.strand import remembered
from collectives.schedule import Schedule

_LANES = (Lane(+1, lambda start, stop: (start, stop)),)


@remembered
def all_reduce(world: int, count: int, finish: bool = False, order: Order = None) -> Schedule:
    """Every rank ends with the reduction of all: a reduce-scatter, then an all-gather.

    `2 (world - 1)` steps, `2 (world - 1) / world * count` elements sent by each rank. With `finish`, the owner of a
    chunk runs the elementwise kernel "finish" on it, once, between the two halves.
    """
    return rotation.all_reduce("ring", world, count, finish, order, _LANES)


@remembered
def reduce_scatter(
    world: int, count: int, finish: bool = False, counts: Lengths = None, order: Order = None
) -> Schedule:
    """Rank `r` ends with its chunk, reduced over all ranks; the rest is undefined.

    `world - 1` steps, `(world - 1) / world * count` elements sent by each rank. With `finish`, each rank runs the
    elementwise kernel "finish" on its chunk at the end.
    """
    return rotation.reduce_scatter("ring", world, count, finish, counts, order, _LANES)


@remembered
def all_gather(world: int, count: int, counts: Lengths = None, order: Order = None) -> Schedule:
    """Every rank begins with its chunk, and ends with the chunks of all.

    `world - 1` steps, `(world - 1) / world * count` elements sent by each rank.
    """
    return rotation.all_gather("ring", world, count, counts, order, _LANES)


@remembered
def broadcast(world: int, count: int, root: int, order: Order = None) -> Schedule:
    """Every rank ends with the buffer of `root`, passed along a chain in ring order.

    `world - 1` steps of one transfer of `count` elements. An engine that cuts a transfer into segments and passes each
    on as it arrives fills the chain, and a large buffer takes little longer than one hop.

    Raises:
        UsageError: `root` is not a rank.

    """
    return rotation.broadcast("ring", world, count, root, order, _LANES)
