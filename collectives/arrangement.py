"""Where members are to each other, measured, and what follows for the order of rings and for hierarchies.

Called by `Communicator.measure` and `optimize`. An arrangement is the same on every member that took part in the
measuring, and names members, not ranks; `Arrangement.of` says what it means for an epoch. It means something as long as
everybody there was measured: members are never numbered again, so whoever holds the arrangement holds that of all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import msgspec
import torch

from collectives import probing
from collectives.errors import MemberLost
from collectives.gather_bytes import Gathers, gather_bytes
from collectives.instructions import Kernel
from collectives.schedule import Schedule
from collectives.tour import Tour, best_tour

PROBE_BYTES = 2**20
"""Of a long message, unless the caller says otherwise."""
_LEVEL = 1.25
"""Costs that differ by less than this factor are about the same: noise must not order a ring."""
_GAP = 3.0
"""So many times the latency within a host, at least, is one between hosts."""


class Probed(Gathers, Protocol):
    """Whose links are measured; `collectives.communicator.Communicator` is one."""

    @property
    def members(self) -> tuple[int, ...]:
        """Ids by rank."""

    @property
    def rank(self) -> int:
        """Of this member."""

    def run(self, schedule: Schedule, buffer: torch.Tensor, *, kernels: dict[str, Kernel]) -> object:
        """Run a schedule of one's own."""


class _Row(msgspec.Struct, frozen=True):
    """What one member tells: where it listens, and what it measured, with the ids of the others."""

    host: str
    probes: list[probing.Probe]


@dataclass(frozen=True, slots=True)
class Measurement:
    """The links between members, the same on every member.

    Attributes:
        members: their ids by rank.
        addresses: where each listens.
        latency: seconds from rank (row) to rank (column), one way: half of the median round trip.
        bandwidth: bytes a second from rank to rank; infinite on the diagonal.
        nbytes: of the messages that bandwidth was measured with.

    """

    members: tuple[int, ...]
    addresses: tuple[str, ...]
    latency: tuple[tuple[float, ...], ...]
    bandwidth: tuple[tuple[float, ...], ...]
    nbytes: int

    def seconds(self, src: int, dst: int) -> float:
        """How long a probe of full length takes from rank to rank."""
        return self.latency[src][dst] + self.nbytes / self.bandwidth[src][dst]


def measure(group: Probed, address: str, nbytes: int = PROBE_BYTES) -> Measurement:
    """Measure all links of a group; every member calls it. If one is lost meanwhile, those that are left begin anew.

    Args:
        group: nothing else is under way in it.
        address: this member's.
        nbytes: of long messages, rounded up to elements of 8 bytes.

    """
    count = max(2, -(-nbytes // 8))
    row = _Row(address, _probe(group, count))
    rows, members = gather_bytes(group, msgspec.msgpack.encode(row))
    return _joined(members, [msgspec.msgpack.decode(data, type=_Row) for data in rows], 8 * count)


def _probe(group: Probed, count: int) -> list[probing.Probe]:
    """Run the probes; what this member measured, with members in place of ranks."""
    buffer = torch.zeros(count, dtype=torch.float64)
    while True:
        clock, members, rank = probing.Clock(), group.members, group.rank
        try:
            group.run(probing.tournament(len(members), count), buffer, kernels={"clock": clock})
        except MemberLost:  # on every survivor
            continue
        found = probing.results(len(members), rank, 8 * count, clock.read)
        return [probe._replace(peer=members[probe.peer]) for probe in found]


def _joined(members: tuple[int, ...], rows: Sequence[_Row], nbytes: int) -> Measurement:
    """Of each pair the member of lower rank has told."""
    world = range(len(members))
    latency = [[0.0 for _ in world] for _ in world]
    bandwidth = [[math.inf for _ in world] for _ in world]
    rank_of = {member: rank for rank, member in enumerate(members)}
    for rank, row in enumerate(rows):
        for probe in row.probes:
            if (peer := rank_of.get(probe.peer)) is not None:
                latency[rank][peer] = latency[peer][rank] = probe.latency
                bandwidth[rank][peer], bandwidth[peer][rank] = probe.out, probe.back
    addresses = tuple(row.host for row in rows)
    return Measurement(members, addresses, tuple(map(tuple, latency)), tuple(map(tuple, bandwidth)), nbytes)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What `arrange` found.

    Attributes:
        measurement: what it follows from.
        ring: ids of the members in the order of the ring.
        hosts: the number of each member's host, in the order of `measurement.members`; None: all are on one.
        tour: the ring in ranks, how fast it is (in seconds for a probe, rounded to levels), and the bounds.

    """

    measurement: Measurement
    ring: tuple[int, ...]
    hosts: tuple[int, ...] | None
    tour: Tour

    def order_of(self, members: Sequence[int]) -> tuple[int, ...] | None:
        """The ring of these members, as their ranks; None: in the order of ranks, or some were not measured."""
        if not self._knows(members):
            return None
        ranks = {member: rank for rank, member in enumerate(members)}
        here = [ranks[member] for member in self.ring if member in ranks]
        at = here.index(0)
        order = (*here[at:], *here[:at])
        return None if order == tuple(range(len(members))) else order

    def hosts_of(self, members: Sequence[int]) -> tuple[int, ...] | None:
        """Numbers of these members' hosts by rank; None: all are on one, or some were not measured."""
        if self.hosts is None or not self._knows(members):
            return None
        host_of = dict(zip(self.measurement.members, self.hosts, strict=True))
        return _numbered([host_of[member] for member in members])

    def _knows(self, members: Sequence[int]) -> bool:
        return set(members) <= set(self.measurement.members)


def arrange(measurement: Measurement) -> Arrangement:
    """Find the ring and the hosts; follows from the measurement alone (rule R8)."""
    world = range(len(measurement.members))
    costs = [[_level(measurement.seconds(src, dst)) if src != dst else 0.0 for dst in world] for src in world]
    tour = best_tour(costs)
    ring = tuple(measurement.members[rank] for rank in tour.order)
    return Arrangement(measurement, ring, _numbered(measurement.addresses) or _clusters(measurement.latency), tour)


def _level(seconds: float) -> float:
    """The nearest power of _LEVEL."""
    return _LEVEL ** round(math.log(max(seconds, 1e-9), _LEVEL))


def _numbered(names: Sequence[object]) -> tuple[int, ...] | None:
    """Number different names in the order in which they come; None if there is only one."""
    numbers: dict[object, int] = {}
    found = tuple(numbers.setdefault(name, len(numbers)) for name in names)
    return found if len(numbers) > 1 else None


def _clusters(latency: Sequence[Sequence[float]]) -> tuple[int, ...] | None:
    """Groups of ranks that are near to each other and far from all others, if there are any.

    Near and far are told apart at the widest gap between latencies.
    """
    world = range(len(latency))
    levels = sorted(latency[low][high] for low in world for high in world if low < high)
    gaps = [(far / max(near, 1e-9), far) for near, far in pairwise(levels)]
    widest, far = max(gaps, default=(0.0, 0.0))
    if widest < _GAP:
        return None
    near_to = [frozenset(peer for peer in world if peer == rank or latency[rank][peer] < far) for rank in world]
    if any(near_to[peer] != near_to[rank] for rank in world for peer in near_to[rank]):
        return None
    return _numbered(near_to)
