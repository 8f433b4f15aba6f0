"""Topology files: JSON that says which hosts, switches and links there are, read strictly.

`load` is called by the command line and by the emulated transport. An example of each kind lies in
`examples/topologies`. Times are in seconds and bandwidths in bytes a second. A file is one object with

- `kind`: "flat", "mesh", "ring", "hosts", "fat-tree" or "graph", and what the kind needs (the classes below);
- `exceptions` (optional): links that differ, by the name of their port, such as `{"rank 3 out": {...}}`;
- `seed` (optional): of the jitter.
"""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from collectives import topology
from collectives.errors import UsageError
from collectives.region import Ints
from collectives.topology import NO_PORT, Link, Topology


class _File(msgspec.Struct, forbid_unknown_fields=True, tag_field="kind", kw_only=True):
    name: str = ""
    exceptions: dict[str, Link] = {}
    seed: int = 0

    def build(self) -> Topology:
        """Make the topology. Raises UsageError."""
        raise AssertionError("every kind has its own")


class Flat(_File, tag="flat"):
    """See `topology.flat`."""

    ranks: int
    link: Link

    def build(self) -> Topology:
        """See `topology.flat`."""
        return topology.flat(self.ranks, self.link)


class Mesh(_File, tag="mesh"):
    """See `topology.mesh`."""

    ranks: int
    link: Link

    def build(self) -> Topology:
        """See `topology.mesh`."""
        return topology.mesh(self.ranks, self.link)


class Ring(_File, tag="ring"):
    """See `topology.ring`."""

    ranks: int
    link: Link

    def build(self) -> Topology:
        """See `topology.ring`."""
        return topology.ring(self.ranks, self.link)


class Hosts(_File, tag="hosts"):
    """See `topology.hosts`."""

    hosts: int
    ranks_per_host: int
    inside: Link
    uplink: Link

    def build(self) -> Topology:
        """See `topology.hosts`."""
        return topology.hosts(self.hosts, self.ranks_per_host, self.inside, self.uplink)


class FatTree(_File, tag="fat-tree"):
    """See `topology.fat_tree`."""

    leaves: int
    hosts_per_leaf: int
    ranks_per_host: int
    inside: Link
    uplink: Link
    oversubscription: float = 1.0

    def build(self) -> Topology:
        """See `topology.fat_tree`."""
        return topology.fat_tree(
            self.leaves, self.hosts_per_leaf, self.ranks_per_host, self.inside, self.uplink, self.oversubscription
        )


class Cable(msgspec.Struct, forbid_unknown_fields=True, rename={"start": "from", "stop": "to"}):
    """A link between two nodes of a graph, in both directions unless `duplex` is false. The ports are `link A>B`."""

    start: str
    stop: str
    link: Link
    duplex: bool = True


class Graph(_File, tag="graph"):
    """Any network: named ranks (in order), switches, and the links between them.

    A route takes as few links as possible; among these, the one whose links stand first in the file. A rank that lies
    on the way passes messages on like a switch.
    """

    ranks: list[str]
    links: list[Cable]
    switches: list[str] = []

    def build(self) -> Topology:
        """Find the shortest ways between all ranks.

        Raises:
            UsageError: a name that is not unique or not known, a link twice, or ranks that no links join.

        """
        nodes = {name: number for number, name in enumerate([*self.ranks, *self.switches])}
        if len(nodes) != len(self.ranks) + len(self.switches):
            raise UsageError("a graph's ranks and switches need names of their own")
        ports: dict[tuple[int, int], tuple[str, Link]] = {}
        for cable in self.links:
            for start, stop in [(cable.start, cable.stop), (cable.stop, cable.start)][: 2 if cable.duplex else 1]:
                for name in (start, stop):
                    if name not in nodes:
                        raise UsageError(f"link {start}>{stop}: no rank and no switch is called {name!r}")
                if (nodes[start], nodes[stop]) in ports or start == stop:
                    raise UsageError(f"link {start}>{stop} is there twice, or leads nowhere")
                ports[nodes[start], nodes[stop]] = (f"link {start}>{stop}", cable.link)
        table = _table(self.ranks, list(ports), len(nodes))

        def router(src: Ints, dst: Ints) -> Ints:
            hops: Ints = table[src, dst]
            return hops[:, : max(1, int((hops != NO_PORT).sum(axis=1).max(initial=0)))]

        return Topology.of("graph", len(self.ranks), list(ports.values()), router)


def _table(ranks: list[str], edges: list[tuple[int, int]], nodes: int) -> Ints:
    """The ports between any two ranks, padded, by breadth-first search from each rank."""
    leaving: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]
    for port, (start, stop) in enumerate(edges):
        leaving[start].append((port, stop))
    ways: dict[tuple[int, int], tuple[int, ...]] = {}
    for src in range(len(ranks)):
        found: dict[int, tuple[int, ...]] = {src: ()}
        queue = deque([src])
        while queue:
            node = queue.popleft()
            for port, stop in leaving[node]:
                if stop not in found:
                    found[stop] = (*found[node], port)
                    queue.append(stop)
        for dst, name in enumerate(ranks):
            if dst not in found:
                raise UsageError(f"no links lead from rank {ranks[src]!r} to rank {name!r}")
            ways[src, dst] = found[dst]
    table = np.full((len(ranks), len(ranks), max(map(len, ways.values()), default=0)), NO_PORT)
    for pair, way in ways.items():
        table[pair][: len(way)] = way
    return table


Kind: TypeAlias = Flat | Mesh | Ring | Hosts | FatTree | Graph


def parse(text: str | bytes, origin: str = "topology") -> Topology:
    """Return the topology that this JSON describes; `origin` names it in errors.

    Raises:
        UsageError: not JSON, an unknown or missing field, or a value that cannot be.

    """
    try:
        described: _File = msgspec.json.decode(text, type=Kind)
        made = described.build()
        for port, link in described.exceptions.items():
            made = made.changed(port, link)
    except (msgspec.DecodeError, UsageError) as error:
        raise UsageError(f"{origin}: {error}") from None
    return replace(made, name=described.name or made.name, seed=described.seed)


def load(path: Path) -> Topology:
    """Read a topology file.

    Raises:
        UsageError: it cannot be read, or as `parse`.

    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"topology {path}: {error.strerror or error}") from None
    return parse(text, f"topology {path}")
