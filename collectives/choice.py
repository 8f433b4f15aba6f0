"""Which algorithms a kind of collective has, how their schedules are made, and which one suits a message.

The one place that knows: operations, simulator, calibration and benchmarks ask here by name. `build` makes a schedule,
`choose` names the algorithm for a message by its size; both follow from their arguments alone, so that all members of
an epoch come to the same answer without a word between them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from collectives.algorithms import (
    bidirectional,
    binomial,
    bruck,
    direct,
    double_tree,
    doubling,
    flat,
    halving_doubling,
    hierarchical,
    pairwise,
    ring,
)
from collectives.errors import UsageError
from collectives.schedule import Schedule

SMALL_BYTES = 64 * 1024
"""All-reduces of up to this many bytes use recursive doubling: few rounds matter more there than few bytes."""


class _Entry(NamedTuple):
    """A function that makes schedules, called with world, count and those of the keywords of `build` that it takes."""

    make: Callable[..., Schedule]
    takes: frozenset[str]


def _entry(make: Callable[..., Schedule], *takes: str) -> _Entry:
    return _Entry(make, frozenset(takes))


_TABLE: dict[str, dict[str, _Entry]] = {
    "all_reduce": {
        "ring": _entry(ring.all_reduce, "finish", "order"),
        "bidirectional": _entry(bidirectional.all_reduce, "finish", "order"),
        "doubling": _entry(doubling.all_reduce, "finish"),
        "halving_doubling": _entry(halving_doubling.all_reduce, "finish"),
        "double_tree": _entry(double_tree.all_reduce, "finish"),
        "direct": _entry(direct.all_reduce, "finish"),
        "hierarchical": _entry(hierarchical.all_reduce, "finish", "hosts"),
    },
    "reduce_scatter": {
        "ring": _entry(ring.reduce_scatter, "finish", "counts", "order"),
        "bidirectional": _entry(bidirectional.reduce_scatter, "finish", "counts", "order"),
        "halving_doubling": _entry(halving_doubling.reduce_scatter, "finish", "counts"),
        "direct": _entry(direct.reduce_scatter, "finish", "counts"),
        "hierarchical": _entry(hierarchical.reduce_scatter, "finish", "counts", "hosts"),
    },
    "all_gather": {
        "ring": _entry(ring.all_gather, "counts", "order"),
        "bidirectional": _entry(bidirectional.all_gather, "counts", "order"),
        "halving_doubling": _entry(halving_doubling.all_gather, "counts"),
        "direct": _entry(direct.all_gather, "counts"),
        "hierarchical": _entry(hierarchical.all_gather, "counts", "hosts"),
    },
    "broadcast": {
        "ring": _entry(ring.broadcast, "root", "order"),
        "bidirectional": _entry(bidirectional.broadcast, "root", "order"),
        "double_tree": _entry(double_tree.broadcast, "root"),
        "direct": _entry(direct.broadcast, "root"),
        "binomial": _entry(binomial.broadcast, "root"),
        "flat": _entry(flat.broadcast, "root"),
        "hierarchical": _entry(hierarchical.broadcast, "root", "hosts"),
    },
    "reduce": {
        "double_tree": _entry(double_tree.reduce, "finish", "root"),
        "direct": _entry(direct.reduce, "finish", "root"),
        "binomial": _entry(binomial.reduce, "finish", "root"),
        "flat": _entry(flat.reduce, "finish", "root"),
    },
    "gather": {
        "flat": _entry(flat.gather, "root", "counts"),
        "binomial": _entry(binomial.gather, "root", "counts"),
    },
    "scatter": {
        "flat": _entry(flat.scatter, "root", "counts"),
        "binomial": _entry(binomial.scatter, "root", "counts"),
    },
    "all_to_all": {
        "pairwise": _entry(pairwise.all_to_all, "counts"),
        "direct": _entry(direct.all_to_all, "counts"),
        "bruck": _entry(bruck.all_to_all, "counts"),
    },
}
_HINTS = frozenset({"order", "hosts"})
"""Say where ranks are, not what is to be achieved: an algorithm that has no use for them does without."""


def names(kind: str) -> tuple[str, ...]:
    """Names of the algorithms that `kind` has, the default for large messages first.

    Raises:
        UsageError: there is no such kind.

    """
    return tuple(_algorithms(kind))


def build(
    kind: str,
    algorithm: str,
    world: int,
    count: int,
    *,
    finish: bool = False,
    root: int = 0,
    counts: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    hosts: Sequence[int] | None = None,
) -> Schedule:
    """Make the schedule of a collective; the same arguments give the same object.

    The work buffer has `count` elements. All of it is reduced or copied by "all_reduce", "reduce" and "broadcast". For
    "reduce_scatter", "all_gather", "gather" and "scatter" part `r` of it is that of rank `r`; for "all_to_all" it
    consists of blocks in row-major (source, destination) order, of which rank `s` holds row `s` and wants column `s`.

    Args:
        kind: see `names`.
        algorithm: one of `names(kind)`.
        world: number of ranks.
        count: elements of the work buffer.
        finish: run the elementwise kernel "finish" once on each reduced element (reductions only).
        root: rank of the root (rooted kinds only).
        counts: lengths of the parts or blocks, zeros allowed, which add up to `count`: one a rank, or `world * world`
            for "all_to_all". None: `split(count, world)`, or equal blocks.
        order: the rank at each position of a ring, a permutation. A hint: algorithms without a ring do without it.
        hosts: the number of each rank's host. A hint, too.

    Raises:
        UsageError: there is no such kind, algorithm, or root; or the algorithm cannot do what the arguments ask for.
            The message names those that can.

    """
    entry = _algorithms(kind).get(algorithm)
    if entry is None:
        raise UsageError(f"{kind}: unknown algorithm {algorithm!r}; there are {', '.join(names(kind))}")
    given = {
        "finish": finish,
        "root": root,
        "counts": _frozen(counts),
        "order": _frozen(order),
        "hosts": _frozen(hosts),
    }
    asked = {name for name, value in given.items() if value not in (None, False, 0)}
    lacking = asked - entry.takes - _HINTS
    if lacking:
        able = [name for name, other in _algorithms(kind).items() if asked - _HINTS <= other.takes]
        raise UsageError(
            f"{kind}: algorithm {algorithm!r} takes no {', '.join(sorted(lacking))}; "
            f"those that do: {', '.join(able) or 'none of this kind'}"
        )
    return entry.make(world, count, **{name: given[name] for name in sorted(entry.takes)})


@functools.lru_cache(maxsize=1024)
def choose(kind: str, world: int, nbytes: int) -> str:
    """Name the algorithm for a work buffer of `nbytes` bytes; follows from the arguments alone (rule R8).

    Raises:
        UsageError: there is no such kind.

    """
    if kind == "all_reduce" and nbytes <= SMALL_BYTES:
        return "doubling"
    return names(kind)[0]


def _algorithms(kind: str) -> dict[str, _Entry]:
    table = _TABLE.get(kind)
    if table is None:
        raise UsageError(f"there is no kind {kind!r} of collective; there are {', '.join(_TABLE)}")
    return table


def _frozen(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
