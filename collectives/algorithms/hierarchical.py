"""Hierarchical: as little as possible across hosts, the rest inside them, for hosts of any and of unlike size.

Links inside a host are faster than those between hosts, and a host's ranks share the latter. So an element crosses from
host to host as if each host were a single rank, while all ranks of a host share the work (Cho et al., "BlueConnect",
IBM J. Res. Dev. 63, 2019).

The place of a rank is its number among those of its host. What is dealt with by place `p` on a large host is dealt with
by place `p mod size` on a host of `size` ranks: its stand-in there. Thus no host needs a leader through which all must
go, and none needs to be as large as the others.

Schedules are remembered: the same arguments give the same object. Without `hosts` all ranks are on one.
"""

from collections.abc import Callable

import numpy as np

from collectives.algorithms import direct, double_tree, halving_doubling
from collectives.algorithms.hosts import Hosts
from collectives.algorithms.parts import (
    Parts,
    Span,
    checked_root,
    even,
    everything,
    only,
    own,
    part_if,
    parts_of,
    within,
)
from collectives.algorithms.strand import NOBODY, Finish, Strand, finishing, lifted, remembered, schedule
from collectives.region import Ints, split
from collectives.schedule import Schedule

_NAME = "hierarchical"


@remembered
def all_reduce(world: int, count: int, finish: bool = False, hosts: tuple[int, ...] | None = None) -> Schedule:
    """Every rank ends with the reduction of all: reduce-scatter inside hosts, all-reduce across, all-gather inside.

    The buffer is cut in as many pieces as the largest host has ranks. Inside hosts the exchange is direct; across them
    each piece is reduced by halving and doubling. With `finish`, the elementwise kernel "finish" runs between these.

    Raises:
        UsageError: `hosts` does not have one number a rank.

    """
    at = Hosts.of(hosts, world)
    across = halving_doubling.rounds(at.number)
    turn = int(at.most > 1) + across
    strands, ends = [_pieces_in(at, count)], []
    for place, (start, stop) in enumerate(split(count, at.most)):
        parts, team = within(start, stop, at.number), at.team(place)
        reduced = halving_doubling.halving(at.number, parts, turn - across)
        gathered = halving_doubling.doubling(at.number, parts, turn + finish)
        strands += [lifted(strand, world, team[None]) for strand in reduced + gathered]
        ends.append(Finish(turn, _by_host(at, parts, team)))
    strands.append(_pieces_out(at, count, turn + finish + across))
    held = wanted = everything(count)
    return schedule(
        "all_reduce",
        _NAME,
        world,
        count,
        tuple(strands),
        held=held,
        wanted=wanted,
        finishes=tuple(ends) if finish else (),
    )


@remembered
def reduce_scatter(
    world: int,
    count: int,
    finish: bool = False,
    counts: tuple[int, ...] | None = None,
    hosts: tuple[int, ...] | None = None,
) -> Schedule:
    """Rank `r` ends with its chunk, reduced over all ranks; the rest is undefined.

    Each chunk is reduced on each host by who stands in there for its owner, who then reduces what these send: two
    steps. The chunks are `split(count, world)`, or have the lengths `counts`. With `finish`, each rank runs the
    elementwise kernel "finish" on its chunk at the end.

    Raises:
        UsageError: `hosts` does not have one number a rank.

    """
    at, parts = Hosts.of(hosts, world), parts_of(count, world, counts)
    turn = int(at.most > 1)

    def stood_for(turn: Ints, rank: Ints) -> Ints:
        return at.stood_for(rank, (at.host[rank] - 1 - turn // at.turns) % at.number, turn % at.turns)

    def stand_in(turn: Ints, rank: Ints) -> Ints:
        return at.stand_in(rank, (at.host[rank] + 1 + turn // at.turns) % at.number, turn % at.turns)

    def span(turn: Ints, rank: Ints) -> Span:
        return part_if(parts, stood_for(turn, rank))

    across = Strand(_step(turn, at.number), stood_for, stand_in, span, combine=True, turns=_others(at))
    strands, whole = (_chunks_inside(at, parts, 0, combine=True), across), everything(count)
    end = finishing(finish, turn + (at.number > 1), parts)
    return schedule("reduce_scatter", _NAME, world, count, strands, held=whole, wanted=own(parts), finishes=end)


@remembered
def all_gather(
    world: int, count: int, counts: tuple[int, ...] | None = None, hosts: tuple[int, ...] | None = None
) -> Schedule:
    """Every rank begins with its chunk, and ends with the chunks of all.

    A chunk goes to who stands in for its owner on each other host, and from there to all of that host: two steps. The
    chunks are `split(count, world)`, or have the lengths `counts`.

    Raises:
        UsageError: `hosts` does not have one number a rank.

    """
    at, parts = Hosts.of(hosts, world), parts_of(count, world, counts)

    def stand_in(turn: Ints, rank: Ints) -> Ints:
        return at.stand_in(rank, (at.host[rank] - 1 - turn // at.turns) % at.number, turn % at.turns)

    def stood_for(turn: Ints, rank: Ints) -> Ints:
        return at.stood_for(rank, (at.host[rank] + 1 + turn // at.turns) % at.number, turn % at.turns)

    def span(turn: Ints, rank: Ints) -> Span:
        return parts(rank)

    across = Strand(_step(0, at.number), stand_in, stood_for, span, turns=_others(at))
    strands = (across, _chunks_inside(at, parts, int(at.number > 1), combine=False))
    return schedule("all_gather", _NAME, world, count, strands, held=own(parts), wanted=everything(count))


@remembered
def broadcast(world: int, count: int, root: int = 0, hosts: tuple[int, ...] | None = None) -> Schedule:
    """Every rank ends with the buffer of `root`: a double tree across hosts, a direct broadcast inside.

    Raises:
        UsageError: `root` is not a rank, or `hosts` does not have one number a rank.

    """
    at = Hosts.of(hosts, world)
    first = checked_root("broadcast", root, world)
    members = at.members.copy()
    home, place = at.host[first], at.place[first]
    members[home, [0, place]] = members[home, [place, 0]]
    leaders = np.roll(members[:, 0], -home)
    strands = [lifted(strand, world, leaders[None]) for strand in double_tree.falling(at.number, count, 0)]
    down = max(strand.steps.stop for strand in strands)
    for size in np.unique(at.size).tolist():
        teams = members[at.size == size, :size]
        strands += [lifted(strand, world, teams) for strand in direct.spreading(size, count, 0, down)]
    return schedule("broadcast", _NAME, world, count, tuple(strands), held=only(root, count), wanted=everything(count))


def _pieces_in(at: Hosts, count: int) -> Strand:
    """Step 0 of the all-reduce: each rank gets what the others of its host have of the pieces that it deals with."""

    def span(turn: Ints, rank: Ints) -> Span:
        return _piece(at, count, at.neighbour(rank, -1 - turn // at.turns), turn % at.turns)

    return _inside(at, 0, at.turns, span, combine=True)


def _pieces_out(at: Hosts, count: int, step: int) -> Strand:
    """The last step of the all-reduce: each rank sends the pieces that it has dealt with to the others of its host."""

    def span(turn: Ints, rank: Ints) -> Span:
        return _piece(at, count, rank, turn % at.turns)

    return _inside(at, step, at.turns, span, combine=False)


def _piece(at: Hosts, count: int, rank: Ints, turn: Ints) -> Span:
    """The piece of the buffer with which a rank deals as the stand-in of that turn."""
    place = at.place[rank] + turn * at.size[at.host[rank]]
    return part_if(even(count, at.most), np.where(place < at.most, place, NOBODY))


def _by_host(at: Hosts, parts: Parts, team: Ints) -> Callable[[Ints], Span]:
    """The part that a rank finishes: that of its host, if it is in the team."""
    return lambda rank: part_if(parts, np.where(team[at.host[rank]] == rank, at.host[rank], NOBODY))


def _chunks_inside(at: Hosts, parts: Parts, step: int, *, combine: bool) -> Strand:
    """Chunks between the ranks of a host: to who stands in for their owners, to be combined, or from there to all."""
    rows = at.number * at.turns

    def span(turn: Ints, rank: Ints) -> Span:
        dealing = at.neighbour(rank, -1 - turn // rows) if combine else rank
        host = (at.host[rank] + turn // at.turns) % at.number
        return part_if(parts, at.stood_for(dealing, host, turn % at.turns))

    return _inside(at, step, rows, span, combine=combine)


def _inside(at: Hosts, step: int, rows: int, span: Callable[[Ints, Ints], Span], *, combine: bool) -> Strand:
    """A direct exchange inside each host, of so many ranges between each two ranks."""
    return Strand(
        steps=_step(step, at.most),
        target=lambda turn, rank: at.neighbour(rank, -1 - turn // rows),
        source=lambda turn, rank: at.neighbour(rank, 1 + turn // rows),
        span=span,
        combine=combine,
        turns=max(1, at.most - 1) * rows,
    )


def _step(step: int, members: int) -> range:
    """This step, if there is anything to do between that many."""
    return range(step, step + (members > 1))


def _others(at: Hosts) -> int:
    return max(1, at.number - 1) * at.turns
