"""Which scheme is fastest for given heads, lengths and links, by the simulator; called by `sequence_attention`.

The rates of a machine are in `Rates`: all members choose alike, so they go by these and never by what each measures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from collectives.algorithms.sequence import Attend, Pack, Task, Unpack
from collectives.simulate import simulate
from collectives.topology import Link, Topology, mesh
from parallel.attention.layout import Layout, Problem, layout
from parallel.attention.local import partial_dtype
from parallel.attention.shares import tiles

LINK = Link(20e-6, 10e9)
"""Between any two ranks, where no topology is given: 20 µs, 10 GB/s each way."""
SEGMENT = 2**20
MOST_PARTS = 4
"""Schemes are compared with no more pieces: it takes a tenth of the time, and they gain from more alike."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a rank computes: floating-point operations of attention, and bytes that it copies or adds, a second."""

    flops: float = 30e9
    copied: float = 5e9
    backward: float = 2.5
    """Work of the backward pass, in forward passes: five products in place of two (Dao, 2023, arXiv:2307.08691)."""


RATES = Rates()


def seconds_of(layout: Layout, rates: Rates = RATES) -> dict[str, float]:
    """How long each kernel of a layout takes."""
    return {name: _seconds(layout, task, rates) for name, task in layout.tasks.items()}


def _seconds(layout: Layout, task: Task, rates: Rates) -> float:
    problem = layout.problem
    row = problem.batch * problem.heads * problem.head_dim / problem.head_ranks
    if isinstance(task, Attend):
        flops = 4 * row * scores(layout, task) * (rates.backward if layout.backward else 1.0)
        return flops / rates.flops
    size = partial_dtype(problem.dtype).itemsize
    rows = layout.queries[task.rank].rows if isinstance(task, Pack | Unpack) else task.piece.rows
    return rows * row * size / rates.copied


def scores(layout: Layout, task: Attend) -> int:
    """How many pairs of a query and a key a kernel looks at, for each head."""
    (q, kv), causal = task[:2], layout.problem.causal
    found = tiles(layout.queries[q.owner], q.start, q.stop, layout.keys[kv.owner], kv.start, kv.stop, causal)
    return sum(tile.scores for tile in found)


def predict(problem: Problem, topology: Topology, rates: Rates = RATES, backward: bool = False) -> float:
    """Seconds that the schedule of a problem takes on a network, by the simulator."""
    plan = layout(problem, backward)
    known = seconds_of(plan, rates)
    return simulate(plan.schedule, topology, itemsize=1, segment_bytes=SEGMENT, kernel_seconds=known.__getitem__).time


def candidates(problem: Problem) -> Iterator[Problem]:
    """The schemes that can solve a problem, each with the columns that divide the ranks."""
    world = problem.world
    for scheme in ("ring", "bidirectional", "token_ring", "token_ring_relay", "ulysses"):
        yield replace(problem, scheme=scheme)
    for columns in range(2, world):
        if world % columns == 0:
            yield replace(problem, scheme="hybrid", columns=columns)
            yield replace(problem, scheme="usp", columns=columns)


@lru_cache(maxsize=128)
def choose(problem: Problem, topology: Topology | None = None, rates: Rates = RATES) -> Problem:
    """Return the problem with the scheme that takes least time on the network; the first of equals.

    Args:
        problem: of any scheme but "tree", which has another meaning.
        topology: None: any two ranks are linked by LINK.
        rates: of all ranks.

    """
    if problem.world == 1:
        return replace(problem, scheme="ring")
    network = mesh(problem.world, LINK) if topology is None else topology
    tried = candidates(replace(problem, parts=min(problem.parts, MOST_PARTS)))
    return replace(min(tried, key=lambda one: predict(one, network, rates)), parts=problem.parts)
