"""Topologies: the ports between ranks, and the way that bytes take from one rank to another.

A *port* is one direction of a link: what enters it leaves it in order, at `bandwidth` bytes a second, `latency`
seconds later. A rank's network card is two ports, a cable between two switches is two ports, and whatever several
routes have in common (a host's uplink) is a port that these share. `collectives.simulate` times schedules on a topology
and `collectives.transports.emulated` makes real processes keep to one; `collectives.topology_file` reads one from JSON.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from collectives.errors import UsageError
from collectives.region import Ints

Floats = npt.NDArray[np.float64]
Router = Callable[[Ints, Ints], Ints]
"""(sources, destinations) -> ports by row, in the order in which they are passed; NO_PORT where there is none."""
NO_PORT = -1


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one direction of a link is like.

    Raises:
        UsageError: a latency or jitter that is negative, or a bandwidth that is not positive.

    """

    latency: float
    """Seconds from the last byte's entering to its arrival."""
    bandwidth: float
    """Bytes a second."""
    jitter: float = 0.0
    """Up to so many seconds of latency more, drawn anew for each message."""

    def __post_init__(self) -> None:
        for name in ("latency", "jitter"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be a number of seconds, 0 or more, not {value!r}")
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise UsageError(f"bandwidth must be a positive number of bytes a second, not {self.bandwidth!r}")

    def scaled(self, factor: float) -> Self:
        """This link with `factor` times the bandwidth."""
        return msgspec.structs.replace(self, bandwidth=self.bandwidth * factor)


@dataclass(frozen=True, slots=True)
class Level:
    """A level of a tree: groups of `size` groups of the level below, each with a link up and the same one down."""

    name: str
    size: int
    link: Link


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """Ranks, ports, and the routes between ranks. Build one with a function of this module, or from a file.

    Attributes:
        name: for people.
        ranks: how many there are.
        ports: the name of each port.
        latency, jitter: seconds, by port.
        bandwidth: bytes a second, by port.
        hosts: the number of each rank's host, where the topology knows of hosts; else None.
        seed: of the jitter.

    """

    name: str
    ranks: int
    ports: tuple[str, ...]
    latency: Floats
    bandwidth: Floats
    jitter: Floats
    router: Router = field(repr=False)
    hosts: tuple[int, ...] | None = None
    seed: int = 0

    def routes(self, src: Ints, dst: Ints) -> Ints:
        """The ports from `src[i]` to `dst[i]` in row `i`, padded with NO_PORT; no rank sends to itself.

        Ports of one column are passed at about the same distance from the source.

        Raises:
            UsageError: there is no such rank.

        """
        beyond = max(int(src.max(initial=0)), int(dst.max(initial=0)))
        if beyond >= self.ranks:
            raise UsageError(f"topology {self.name!r} has {self.ranks} ranks; there is no rank {beyond}")
        return self.router(src, dst)

    def route(self, src: int, dst: int) -> tuple[int, ...]:
        """The ports from one rank to another, in the order in which they are passed."""
        row = self.routes(np.array([src]), np.array([dst]))[0]
        return tuple(port for port in row.tolist() if port != NO_PORT)

    def changed(self, port: str, link: Link) -> Self:
        """This topology with another link at the port of that name.

        Raises:
            UsageError: there is no such port.

        """
        if port not in self.ports:
            some = ", ".join(repr(name) for name in self.ports[:4])
            raise UsageError(f"topology {self.name!r} has no port {port!r}; its ports are {some}...")
        at = self.ports.index(port)
        columns = {name: getattr(self, name).copy() for name in ("latency", "bandwidth", "jitter")}
        for name, values in columns.items():
            values[at] = getattr(link, name)
        return replace(self, **columns)

    def link(self, port: int) -> Link:
        """What the port of this number is like."""
        return Link(float(self.latency[port]), float(self.bandwidth[port]), float(self.jitter[port]))

    @classmethod
    def of(
        cls,
        name: str,
        ranks: int,
        ports: Sequence[tuple[str, Link]],
        router: Router,
        hosts: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Self:
        """Build a topology of named ports.

        Raises:
            UsageError: fewer than one rank.

        """
        if ranks < 1:
            raise UsageError(f"a topology needs at least one rank, not {ranks}")
        names = tuple(port for port, _ in ports)
        latency, bandwidth, jitter = (
            np.array([getattr(link, what) for _, link in ports], dtype=np.float64)
            for what in ("latency", "bandwidth", "jitter")
        )
        where = None if hosts is None else tuple(hosts)
        return cls(name, ranks, names, latency, bandwidth, jitter, router, where, seed)


def tree(name: str, levels: Sequence[Level], top: int = 1) -> Topology:
    """Ranks below hosts below switches: a message goes up to the lowest group of both ends, and down again.

    Args:
        name: for people.
        levels: from the ranks upwards. Level 0 is that of the ranks and has size 1; its link is the rank's own port.
        top: how many groups of the last level the network joins; what joins them is without bound.

    A rank's ports are `rank R out` and `rank R in`, those of group G of a level `NAME G up` and `NAME G down`.

    Raises:
        UsageError: sizes that are not positive, or the first is not 1.

    """
    if not levels or levels[0].size != 1 or any(level.size < 1 for level in levels) or top < 1:
        raise UsageError(f"topology {name!r} needs at least one rank, and one of whatever it has above the ranks")
    per_group = np.cumprod([level.size for level in levels]).tolist()
    ranks = per_group[-1] * top
    groups = [ranks // size for size in per_group]
    bases = np.concatenate([[0], np.cumsum([2 * count for count in groups])]).tolist()
    ports: list[tuple[str, Link]] = []
    for level, count in zip(levels, groups, strict=True):
        out, into = ("out", "in") if level is levels[0] else ("up", "down")
        ports += [(f"{level.name} {group} {way}", level.link) for way in (out, into) for group in range(count)]

    def router(src: Ints, dst: Ints) -> Ints:
        up, down = [], []
        for size, count, base in zip(per_group, groups, bases, strict=False):
            ours, theirs = src // size, dst // size
            apart = ours != theirs
            up.append(np.where(apart, base + ours, NO_PORT))
            down.append(np.where(apart, base + count + theirs, NO_PORT))
        return np.stack([*up, *reversed(down)], axis=1)

    hosts = [rank // per_group[1] for rank in range(ranks)] if len(levels) > 1 else None
    return Topology.of(name, ranks, ports, router, hosts)


def flat(ranks: int, link: Link) -> Topology:
    """A full crossbar: each rank has one port out and one port in, shared by all its peers, and nothing else is shared.

    A message passes two ports, each of half of `link`'s latency.
    """
    return tree("flat", [Level("rank", 1, Link(link.latency / 2, link.bandwidth, link.jitter / 2))], ranks)


def hosts(count: int, ranks_per_host: int, inside: Link, uplink: Link) -> Topology:
    """Hosts behind one switch: `inside` are the ports of a rank within its host, `uplink` those of each host."""
    return tree("hosts", [Level("rank", 1, inside), Level("host", ranks_per_host, uplink)], count)


def fat_tree(
    leaves: int, hosts_per_leaf: int, ranks_per_host: int, inside: Link, uplink: Link, oversubscription: float = 1.0
) -> Topology:
    """Hosts behind leaf switches behind a spine.

    A leaf's way up carries what all its hosts' uplinks carry, divided by `oversubscription`: one port stands for all
    its cables, as if the load on them were balanced perfectly.

    Raises:
        UsageError: an oversubscription that is not positive, or a size that is not.

    """
    if not (math.isfinite(oversubscription) and oversubscription > 0):
        raise UsageError(f"oversubscription must be a positive number, not {oversubscription!r}")
    leaf = uplink.scaled(hosts_per_leaf / oversubscription) if hosts_per_leaf > 0 else uplink
    levels = [Level("rank", 1, inside), Level("host", ranks_per_host, uplink), Level("leaf", hosts_per_leaf, leaf)]
    return tree("fat-tree", levels, leaves)


def mesh(ranks: int, link: Link) -> Topology:
    """A link of its own in each direction between any two ranks: nothing is shared. The ports are `link S>D`."""
    pairs = [(src, dst) for src in range(ranks) for dst in range(ranks)]
    ports = [(f"link {src}>{dst}", link) for src, dst in pairs]
    return Topology.of("mesh", ranks, ports, lambda src, dst: (src * ranks + dst)[:, None])


def ring(ranks: int, link: Link) -> Topology:
    """A duplex link between neighbours of a ring, each with its own rate; others are reached the shorter way round.

    The ports are `link R>S`. Two ranks have two links, of which routes use the first.
    """
    ahead = [(f"link {rank}>{(rank + 1) % ranks}", link) for rank in range(ranks)]
    second = " second" if ranks == 2 else ""
    back = [(f"link {rank}>{(rank - 1) % ranks}{second}", link) for rank in range(ranks)]

    def router(src: Ints, dst: Ints) -> Ints:
        forward = (dst - src) % ranks
        backward = ranks - forward
        direction = np.where(forward <= backward, 1, -1)
        hops = np.minimum(forward, backward)
        hop = np.arange(int(hops.max(initial=0)))
        at = (src[:, None] + direction[:, None] * hop) % ranks + np.where(direction > 0, 0, ranks)[:, None]
        return np.where(hop < hops[:, None], at, NO_PORT)

    return Topology.of("ring", ranks, ahead + back, router)
