"""Shapes of emulated networks: which nodes there are, which cables are between them, and which way packets take.

Pure; `launch.network` builds them. Nodes are hosts, "0", "1", ..., and hubs, which are switches: "hub" and "hub2".
"""

from dataclasses import dataclass

from collectives.errors import UsageError

SHAPES = ("star", "ring", "mesh", "two-sites")
HUB, FAR_HUB = "hub", "hub2"
Cable = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Shape:
    """A network of so many hosts; cables in the order in which they are laid."""

    name: str
    hosts: int
    hubs: tuple[str, ...]
    cables: tuple[Cable, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Hubs, then hosts."""
        return (*self.hubs, *map(str, range(self.hosts)))

    def of(self, node: str) -> list[Cable]:
        """The cables of a node."""
        return [cable for cable in self.cables if node in cable]

    def between(self, one: str, other: str) -> Cable:
        """The cable between two nodes.

        Raises:
            UsageError: there is none.

        """
        for cable in self.cables:
            if {one, other} == set(cable):
                return cable
        known = ", ".join("-".join(cable) for cable in self.cables)
        raise UsageError(f"a {self.name} of {self.hosts} hosts has no cable {one}-{other}; it has {known}")

    def next(self, host: int, target: int) -> str:
        """The node that a packet goes to first: the switch, the target itself, or the neighbour on the shorter way."""
        if self.hubs:
            (cable,) = self.of(str(host))
            return cable[1]
        if self.name == "mesh":
            return str(target)
        forward = (target - host) % self.hosts
        return str((host + (1 if 2 * forward <= self.hosts else -1)) % self.hosts)


def shape_of(name: str, hosts: int) -> Shape:
    """Return a shape: star (a switch in the middle), ring, mesh (each with each), two-sites (halves, a switch each).

    Raises:
        UsageError: an unknown name, or too few hosts.

    """
    least = {"star": 1, "ring": 3, "mesh": 2, "two-sites": 2}
    if name not in least:
        raise UsageError(f"there is no topology {name!r}; there are {', '.join(SHAPES)}")
    if hosts < least[name]:
        raise UsageError(f"a {name} has {least[name]} hosts or more, not {hosts}")
    names = [str(host) for host in range(hosts)]
    if name == "star":
        return Shape(name, hosts, (HUB,), tuple((host, HUB) for host in names))
    if name == "two-sites":
        near = (hosts + 1) // 2
        cables = [(host, HUB if int(host) < near else FAR_HUB) for host in names]
        return Shape(name, hosts, (HUB, FAR_HUB), (*cables, (HUB, FAR_HUB)))
    if name == "ring":
        return Shape(name, hosts, (), tuple((host, names[(int(host) + 1) % hosts]) for host in names))
    return Shape(name, hosts, (), tuple((a, b) for a in names for b in names if int(a) < int(b)))
