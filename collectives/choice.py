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
from collectives.cost import Profile, estimate, profile_of
from collectives.errors import UsageError
from collectives.schedule import Schedule

_EXACT = 64
"""In worlds of up to this size all algorithms are estimated and may be chosen, in larger ones those that `scale`."""
_LEAST = 64
"""Bytes a rank: messages of fewer cost no less, but some of their parts would be empty."""
_EQUAL = 1.15
"""Algorithms whose estimates differ by no more than this factor are about as good; estimates are no better than so."""


class _Entry(NamedTuple):
    """A function that makes schedules, called with world, count and those of the keywords of `build` that it takes."""

    make: Callable[..., Schedule]
    takes: frozenset[str]
    scales: bool
    """Whether rows, and steps that are not alike, are few enough to be looked through in a world of thousands."""


def _entry(make: Callable[..., Schedule], *takes: str, scales: bool = False) -> _Entry:
    return _Entry(make, frozenset(takes), scales)


_TABLE: dict[str, dict[str, _Entry]] = {
    "all_reduce": {
        "ring": _entry(ring.all_reduce, "finish", "order", scales=True),
        "bidirectional": _entry(bidirectional.all_reduce, "finish", "order"),
        "doubling": _entry(doubling.all_reduce, "finish", scales=True),
        "halving_doubling": _entry(halving_doubling.all_reduce, "finish", scales=True),
        "double_tree": _entry(double_tree.all_reduce, "finish", scales=True),
        "direct": _entry(direct.all_reduce, "finish"),
        "hierarchical": _entry(hierarchical.all_reduce, "finish", "hosts", scales=True),
    },
    "reduce_scatter": {
        "ring": _entry(ring.reduce_scatter, "finish", "counts", "order", scales=True),
        "bidirectional": _entry(bidirectional.reduce_scatter, "finish", "counts", "order"),
        "halving_doubling": _entry(halving_doubling.reduce_scatter, "finish", "counts", scales=True),
        "direct": _entry(direct.reduce_scatter, "finish", "counts"),
        "hierarchical": _entry(hierarchical.reduce_scatter, "finish", "counts", "hosts"),
    },
    "all_gather": {
        "ring": _entry(ring.all_gather, "counts", "order", scales=True),
        "bidirectional": _entry(bidirectional.all_gather, "counts", "order"),
        "halving_doubling": _entry(halving_doubling.all_gather, "counts", scales=True),
        "direct": _entry(direct.all_gather, "counts"),
        "hierarchical": _entry(hierarchical.all_gather, "counts", "hosts"),
    },
    "broadcast": {
        "ring": _entry(ring.broadcast, "root", "order"),
        "bidirectional": _entry(bidirectional.broadcast, "root", "order"),
        "double_tree": _entry(double_tree.broadcast, "root", scales=True),
        "direct": _entry(direct.broadcast, "root"),
        "binomial": _entry(binomial.broadcast, "root", scales=True),
        "flat": _entry(flat.broadcast, "root", scales=True),
        "hierarchical": _entry(hierarchical.broadcast, "root", "hosts", scales=True),
    },
    "reduce": {
        "binomial": _entry(binomial.reduce, "finish", "root", scales=True),
        "double_tree": _entry(double_tree.reduce, "finish", "root", scales=True),
        "flat": _entry(flat.reduce, "finish", "root", scales=True),
        "direct": _entry(direct.reduce, "finish", "root"),
    },
    "gather": {
        "flat": _entry(flat.gather, "root", "counts", scales=True),
        "binomial": _entry(binomial.gather, "root", "counts", scales=True),
    },
    "scatter": {
        "flat": _entry(flat.scatter, "root", "counts", scales=True),
        "binomial": _entry(binomial.scatter, "root", "counts", scales=True),
    },
    "all_to_all": {
        "pairwise": _entry(pairwise.all_to_all, "counts"),
        "direct": _entry(direct.all_to_all, "counts"),
        "bruck": _entry(bruck.all_to_all, "counts"),
    },
}
_HINTS = frozenset({"order", "hosts"})
"""Say where ranks are, not what is to be achieved: an algorithm that has no use for them does without."""


def kinds() -> tuple[str, ...]:
    """The kinds of collectives that have algorithms here."""
    return tuple(_TABLE)


def names(kind: str) -> tuple[str, ...]:
    """Names of the algorithms that `kind` has; of two that are about as good, `choose` takes the first.

    Raises:
        UsageError: there is no such kind.

    """
    return tuple(_algorithms(kind))


def takes(kind: str, algorithm: str) -> frozenset[str]:
    """Those of "finish", "root", "counts", "order" and "hosts" that an algorithm heeds.

    Raises:
        UsageError: there is no such kind or algorithm.

    """
    return _entry_of(kind, algorithm).takes


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
    entry = _entry_of(kind, algorithm)
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


def choose(
    kind: str,
    world: int,
    nbytes: int,
    *,
    profile: Profile | str = "gloo",
    hosts: Sequence[int] | None = None,
) -> str:
    """Name the algorithm for a work buffer of `nbytes` bytes; follows from the arguments alone (rule R8).

    The algorithm is the one with the least estimate (`collectives.cost`) for the next power of two of bytes; of some
    that are about as good, the one that the profile favours, else the one that is first in `names`. In worlds of more
    than 64 ranks only algorithms of few rows a step are considered; there an all-to-all is judged by what is
    best for blocks of that size among 64 ranks.

    Args:
        kind: see `names`.
        world: number of ranks.
        nbytes: bytes of the whole work buffer; see `build`.
        profile: of the transport, or the transport's name. The same on all ranks.
        hosts: the number of each rank's host; None: all on one.

    Raises:
        UsageError: there is no such kind, or `hosts` does not have one number a rank.

    """
    if isinstance(profile, str):
        profile = profile_of(profile)
    if kind == "all_to_all" and world > _EXACT:
        nbytes, world, hosts = nbytes * _EXACT * _EXACT // (world * world), _EXACT, None
    nbytes = max(nbytes, _LEAST * world)
    return _chosen(kind, world, 1 << (nbytes - 1).bit_length(), profile, _frozen(hosts))


def predict(
    kind: str, algorithm: str, world: int, nbytes: int, profile: Profile, hosts: Sequence[int] | None = None
) -> float:
    """Estimate the seconds that an algorithm takes for a work buffer of `nbytes` bytes; see `collectives.cost`.

    Raises:
        UsageError: as `build`.

    """
    count = -(-nbytes // world**2) * world**2 if kind == "all_to_all" else nbytes
    return estimate(build(kind, algorithm, world, count, hosts=hosts), profile, hosts=hosts)


@functools.lru_cache(maxsize=4096)
def _chosen(kind: str, world: int, nbytes: int, profile: Profile, hosts: tuple[int, ...] | None) -> str:
    able = [
        name
        for name, entry in _algorithms(kind).items()
        if (entry.scales or world <= _EXACT) and ("hosts" not in entry.takes or (hosts and 1 < len(set(hosts)) < world))
    ] or [names(kind)[0]]
    if len(able) == 1 or world == 1:
        return able[0]
    cost = {name: predict(kind, name, world, nbytes, profile, hosts) for name in able}
    good = [name for name in able if cost[name] <= _EQUAL * min(cost.values())]
    return next((name for name in profile.favours if name in good), good[0])


def _entry_of(kind: str, algorithm: str) -> _Entry:
    entry = _algorithms(kind).get(algorithm)
    if entry is None:
        raise UsageError(f"{kind}: unknown algorithm {algorithm!r}; there are {', '.join(names(kind))}")
    return entry


def _algorithms(kind: str) -> dict[str, _Entry]:
    table = _TABLE.get(kind)
    if table is None:
        raise UsageError(f"there is no kind {kind!r} of collective; there are {', '.join(_TABLE)}")
    return table


def _frozen(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
