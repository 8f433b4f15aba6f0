"""The bidirectional ring: as `collectives.algorithms.ring`, with half of each chunk travelling in each direction.

The first half of a chunk goes to successors and the second half to predecessors, at the same time. A rank sends and
receives as many elements, in as many steps, as in the ring, but spread evenly over both neighbours: on links that carry
`b` bytes a second each way, a large all-reduce takes half as long. In a world of two both halves go to the one
neighbour, and nothing is gained. The idea is that of rings on a torus of links (Jain and Sabharwal, "Optimal bucket
algorithms for large MPI collectives on torus interconnects", ICS 2010).

The chunk of rank `r` is part `r` of `split(count, world)`, or of parts with the lengths `counts`. `order` is the rank
at each position of the ring; it decides who is neighbour to whom, not whose chunk is which.

Schedules are remembered: the same arguments give the same object.
"""

from collectives.algorithms import rotation
from collectives.algorithms.parts import Span
from collectives.algorithms.rotation import Lane, Lengths, Order
from collectives.algorithms.strand import remembered
from collectives.region import Ints
from collectives.schedule import Schedule


def _first(start: Ints, stop: Ints) -> Span:
    return start, (start + stop + 1) // 2


def _second(start: Ints, stop: Ints) -> Span:
    return (start + stop + 1) // 2, stop


_LANES = (Lane(+1, _first), Lane(-1, _second))


@remembered
def all_reduce(world: int, count: int, finish: bool = False, order: Order = None) -> Schedule:
    """Every rank ends with the reduction of all: a reduce-scatter, then an all-gather.

    `2 (world - 1)` steps, `(world - 1) / world * count` elements sent by each rank in each direction. With `finish`,
    the owner of a chunk runs the elementwise kernel "finish" on it, once, between the two halves.
    """
    return rotation.all_reduce("bidirectional", world, count, finish, order, _LANES)


@remembered
def reduce_scatter(
    world: int, count: int, finish: bool = False, counts: Lengths = None, order: Order = None
) -> Schedule:
    """Rank `r` ends with its chunk, reduced over all ranks; the rest is undefined.

    `world - 1` steps, `(world - 1) / (2 world) * count` elements sent by each rank in each direction. With `finish`,
    each rank runs the elementwise kernel "finish" on its chunk at the end.
    """
    return rotation.reduce_scatter("bidirectional", world, count, finish, counts, order, _LANES)


@remembered
def all_gather(world: int, count: int, counts: Lengths = None, order: Order = None) -> Schedule:
    """Every rank begins with its chunk, and ends with the chunks of all.

    `world - 1` steps, `(world - 1) / (2 world) * count` elements sent by each rank in each direction.
    """
    return rotation.all_gather("bidirectional", world, count, counts, order, _LANES)


@remembered
def broadcast(world: int, count: int, root: int, order: Order = None) -> Schedule:
    """Every rank ends with the buffer of `root`: its first half passed along the ring one way, its second the other.

    `world - 1` steps of two transfers of `count / 2` elements. An engine that cuts a transfer into segments and passes
    each on as it arrives fills both chains, and a large buffer takes little longer than one hop of half of it.

    Raises:
        UsageError: `root` is not a rank.

    """
    return rotation.broadcast("bidirectional", world, count, root, order, _LANES)
