"""Which ranks share a host, as arrays: what `collectives.algorithms.hierarchical` goes by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from collectives.algorithms.strand import NOBODY
from collectives.errors import UsageError
from collectives.region import Ints


@dataclass(frozen=True, slots=True)
class Hosts:
    """Ranks by host; the place of a rank is its number among the ranks of its host."""

    host: Ints
    """Of each rank, numbered from 0."""
    place: Ints
    """Of each rank."""
    size: Ints
    """Ranks of each host."""
    members: Ints
    """Shape (hosts, ranks of the largest host): the rank at a place, or NOBODY."""

    @classmethod
    def of(cls, hosts: Sequence[int] | None, world: int) -> Self:
        """From the number of each rank's host, any integers; None: all on one host.

        Raises:
            UsageError: there is not one number a rank.

        """
        if hosts is not None and len(hosts) != world:
            raise UsageError(f"hosts must be one number a rank; there are {len(hosts)} for a world of {world}")
        _, host, size = np.unique(
            [0] * world if hosts is None else list(hosts), return_inverse=True, return_counts=True
        )
        ranks = np.argsort(host, kind="stable")
        place = np.empty(world, dtype=np.int64)
        place[ranks] = np.arange(world) - np.repeat(np.cumsum(size) - size, size)
        members = np.full((len(size), size.max()), NOBODY)
        members[host, place] = np.arange(world)
        return cls(host, place, size, members)

    @property
    def number(self) -> int:
        """Number of hosts."""
        return len(self.size)

    @property
    def most(self) -> int:
        """Ranks of the largest host."""
        return int(self.size.max())

    @property
    def turns(self) -> int:
        """For how many places of the largest host a rank of the smallest one stands in."""
        return -(-self.most // int(self.size.min()))

    def team(self, place: int) -> Ints:
        """Who deals with a place of the largest host: one rank of each host."""
        return self.members[np.arange(self.number), place % self.size]

    def stand_in(self, rank: Ints, host: Ints, turn: Ints) -> Ints:
        """The rank of a host that stands in for this one, if that is its turn, else NOBODY."""
        turns, place = np.divmod(self.place[rank], self.size[host])
        return np.where(turns == turn, self.members[host, place], NOBODY)

    def stood_for(self, rank: Ints, host: Ints, turn: Ints) -> Ints:
        """The rank of a host for which this one stands in in that turn, or NOBODY. On its own host: itself."""
        place = self.place[rank] + turn * self.size[self.host[rank]]
        return np.where(place < self.size[host], self.members[host, np.minimum(place, self.most - 1)], NOBODY)

    def neighbour(self, rank: Ints, distance: Ints) -> Ints:
        """The rank so many places further on the same host, going round; NOBODY once round."""
        size = self.size[self.host[rank]]
        there = self.members[self.host[rank], (self.place[rank] + distance) % size]
        return np.where(np.abs(distance) < size, there, NOBODY)
