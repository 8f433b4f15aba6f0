"""The simulated data network: one `Mesh` an epoch, links that are FIFO, slow, and fail; ends that close."""

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.membership.host import Host
    from tests.membership.world import World

CONNECT_SECONDS = 3.0

Box = tuple[int, int, str]
"""Where notes of a lane arrive: who gets them, from whom."""


class Lost(Exception):
    """What `TransportLost` is to the engine: `peer` is a member id, 0 where this end was closed."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


class Mesh:
    """The links of one epoch. Members are named by their ids."""

    def __init__(self, world: "World", epoch: int, members: tuple[int, ...]) -> None:
        self.world, self.epoch, self.members = world, epoch, members
        self.ready: set[int] = set()
        self._arrived: dict[int, Host] = {}
        self._closed: set[int] = set()
        self._failed: set[tuple[int, int]] = set()
        """(who sees it, the other end)"""
        self._delay = world.history.delay
        self._mail: defaultdict[Box, deque[Any]] = defaultdict(deque)
        self._awaited: set[Box] = set()
        """Mail that a thread has looked for in vain."""
        self._busy: dict[tuple[int, int], float] = {}

    def arrive(self, host: "Host") -> None:
        """A member has applied the epoch and links with the others; all are ready when all have."""
        world, me = self.world, host.core.member
        self._arrived[me] = host
        if len(self._arrived) < len(self.members):
            return
        bad = world.faults.cables_of(self._arrived)
        for member in self.members:
            if member not in bad:
                world.after(world.lag(world.history.delay), world.network, self._get_ready, member)
            for other in bad.get(member, ()):
                # The build of the mesh fails at one end or at both.
                if member < other or world.rng.random() < 0.5:
                    end = self._arrived[member]
                    world.after(CONNECT_SECONDS, end, end.link_failed, self.epoch, other)

    def _get_ready(self, me: int) -> None:
        if me not in self._closed:
            self.ready.add(me)
            self._arrived[me].poke()

    def send(self, me: int, peer: int, lane: str, note: Any) -> None:
        """Send a note. Raises `Lost`."""
        pair = (me, peer)
        if self._closed and me in self._closed:
            raise Lost(0)
        if self._failed and pair in self._failed:
            raise Lost(peer)
        world = self.world
        if world.faults.silent_pairs and world.faults.silent(self._arrived[me], self._arrived[peer]):
            return
        time = self._busy[pair] = max(self._busy.get(pair, 0.0), world.now + world.lag(self._delay))
        world.at(time, world.network, self._deliver, (peer, me, lane), note)

    def _deliver(self, box: Box, note: Any) -> None:
        host = self._arrived[box[0]]
        if host.dead or (self._closed and box[0] in self._closed) or (self._failed and box[:2] in self._failed):
            return
        self._mail[box].append(note)
        if box in self._awaited:
            self._awaited.remove(box)
            host.poke()

    def take(self, me: int, peer: int, lane: str) -> Any:
        """Take the next note of a peer, None if there is none yet. Raises `Lost`."""
        if self._closed and me in self._closed:
            raise Lost(0)
        box = (me, peer, lane)
        mail = self._mail[box]
        if mail:
            return mail.popleft()
        if self._failed and (me, peer) in self._failed:
            raise Lost(peer)
        self._awaited.add(box)
        return None

    def close(self, me: int, silently: bool = False) -> None:
        """Close one end, by a fence or a death: its links fail for the others, a little later if not silently."""
        if me in self._closed:
            return
        self._closed.add(me)
        self.ready.discard(me)
        if silently:
            return
        world = self.world
        for peer in self.members:
            if peer != me:
                world.after(world.lag(world.history.delay), world.network, self.fail, peer, me)

    def fail(self, me: int, peer: int) -> None:
        """A member sees its link to another fail."""
        self._failed.add((me, peer))
        host = self._arrived.get(me)
        if host is not None:
            host.poke()
