"""The transport of processes that an MPI launcher started: bulk over MPI, notes over the links.

Built by the membership for each epoch. MPI only carries bytes, by non-blocking point-to-point calls that are polled;
it makes no call that several members must make together, so that nothing can hang in it because a rank is dead or
stopped, and it has no say in who is alive. An aborted epoch leaves transfers behind in the library; see
`mpi_leftovers`. Ranks that were spawned are connected pair by pair; see `mpi_spawn`.

Each stream of messages (from one member to another on one channel, in one epoch) has a tag of its own, which the
sender chooses and tells the receiver in a note: what a former epoch left can never be taken for a message of this one.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from torch import Tensor

from collectives.errors import OperationTimeout, TransportLost, Unsupported
from collectives.transports import mpi_spawn, mpi_world
from collectives.transports.base import CHANNELS, Pending, Transport
from collectives.transports.links import PeerLinks, Posted
from collectives.transports.mpi_leftovers import Owed, Stream
from collectives.transports.mpi_message import Inbound, Message
from collectives.transports.mpi_world import Place
from collectives.transports.site import Site

INLINE_LIMIT = 2**16
SEGMENT_BYTES = 2**21
"""The best of 256 KiB to 4 MiB on 2 and 4 ranks, by a little: see `benchmarks.mpi`, option --segment."""
MOST_BYTES = 2**30
"""Of one MPI message: its count is a 32-bit number. What is longer goes in pieces."""
_TAGS = 2**31
"""Added to a channel's number: where the tags of its streams are told."""
_HELLO, _PORT = CHANNELS + 1, CHANNELS + 2
_GLANCE = 2e-3
"""Seconds between two looks at MPI while a thread waits for a note, and has transfers of its own under way."""
_LONG_GLANCE = 10e-3
"""The same where it has none. The library may call a send over, and keep the end of it until it is called again."""


class Hello(msgspec.Struct, frozen=True):
    """What the members of an epoch tell each other about their places in MPI.

    `job` is the name of the universe they started in, `places` their ranks in all universes that they are in, and
    `owed` the sends of former epochs that are not over.
    """

    job: str
    places: dict[str, int]
    owed: list[Owed]


class MpiTransport(Transport):
    """Moves one epoch's bytes through MPI.

    Call `connect` once before use. `abort` may come at any time, also during `connect`.

    Raises:
        Unsupported: see `mpi_world.enter`.

    """

    inline_limit = INLINE_LIMIT
    segment_bytes = SEGMENT_BYTES

    def __init__(self, site: Site) -> None:
        self.rank, self.size = site.rank, site.size
        self.world = mpi_world.enter()
        self._run = site.key
        self._links = PeerLinks(site)
        self._places: dict[int, Place] = {}  # by rank in the epoch; foreigners have none
        self._afar = False  # whether there are members that the library reaches by TCP
        self._lock = threading.Lock()
        self._aborted = False
        self._outbound: dict[tuple[int, int], Stream] = {}
        self._inbound: dict[tuple[int, int], Inbound] = {}
        self._inflight: set[Message] = set()

    @classmethod
    def prepare(cls) -> None:
        """Start MPI; see `Transport.prepare`."""
        mpi_world.enter()

    def connect(self, timeout: float) -> None:
        """Link with all peers and learn their places in MPI.

        Raises:
            TransportLost: aborted (`peer` None), or `peer` did not link in `timeout` seconds.
            Unsupported: this process is not of the same MPI job as rank 0, or the library cannot do without a member
                that is gone.

        """
        deadline = time.monotonic() + timeout
        self._links.connect(timeout)
        hellos = self._tell(deadline)
        if not self._reachable(hellos[0]):
            raise Unsupported(
                f"this process is no rank of the MPI job that runs here (rank 0's is {hellos[0].job!r}, ours "
                f"{self.world.job.name!r}): MPI cannot take it in. Start all members with one mpirun or by "
                "`Communicator.spawn`, or use the transport gloo or sockets, which let anybody join"
            )
        self._refuse_if_gone(hellos.values())
        for rank, hello in hellos.items():  # in the order of ranks on all members, so that none waits in a circle
            if self._reachable(hello):
                self._places[rank] = self.world.find(hello.places) or self._meet(rank, deadline)
                self._clear(rank, hello)
        self._afar = any(place.universe != self.world.job.name for place in self._places.values())

    @staticmethod
    def spawn(command: Sequence[str], environ: Mapping[str, str], count: int, timeout: float) -> None:
        """Start `count` processes that can join; see `mpi_spawn.spawn`.

        Raises:
            SpawnFailed: see there.
            Unsupported: the library is another one than Open MPI.

        """
        world = mpi_world.enter()
        if not world.recovers:
            raise Unsupported(f"ranks are spawned under Open MPI 5, and this is {world.library}")
        mpi_spawn.spawn(world, command, environ, count, timeout)

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Post a bulk send; see `Transport.send`."""
        self.world.leftovers.sweep()
        with self._lock:
            self.refuse()
            stream = self._outbound.get((peer, channel))
            if stream is None:
                stream = self._outbound[peer, channel] = Stream(self._place(peer), self.world.new_tag())
                self._links.send(peer, stream.tag.to_bytes(4), channel + _TAGS)
            message = Message(self, peer, data, sent_on=stream)
            self._inflight.add(message)
            self._post(message, stream)
        return message

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Post a bulk receive; see `Transport.recv`."""
        with self._lock:
            self.refuse()
            inbound = self._inbound.get((peer, channel))
            if inbound is None:
                inbound = self._inbound[peer, channel] = Inbound(peer, channel, self._place(peer))
            message = Message(self, peer, into, inbound=inbound)
            self._inflight.add(message)
            if inbound.stream is None:
                inbound.unposted.append(message)
            else:
                self._post(message, inbound.stream)
        return message

    def learn_tag(self, inbound: Inbound) -> None:
        """Wait for the tag of a stream, and post all receives that wait for it. Called by the channel's thread."""
        tag = int.from_bytes(self.recv_note(inbound.peer, inbound.channel + _TAGS))
        with self._lock:
            self.refuse()
            inbound.stream = Stream(inbound.place, tag)
            for message in inbound.unposted:
                self._post(message, inbound.stream)
            inbound.unposted.clear()

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note; see `Transport.send_note`."""
        self._links.send(peer, note, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Receive a note; see `Transport.recv_note`.

        MPI moves what is under way only while somebody calls it, and the peer may wait for just that: so call it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._inflight or self._afar:
            glance = _GLANCE if self._inflight else _LONG_GLANCE
            left = glance if deadline is None else min(glance, deadline - time.monotonic())
            try:
                return self._links.recv(peer, channel, max(0.0, left))
            except OperationTimeout:
                if left < glance:
                    raise
                self._progress()
        return self._links.recv(peer, channel, None if deadline is None else max(0.0, deadline - time.monotonic()))

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """Post a note; see `Transport.post_note`."""
        pending = self._links.post(peer, note, channel)
        if isinstance(pending, Posted):  # while this thread polls MPI, nobody else might move it
            self._links.flush_behind(peer)
        return pending

    def abort(self) -> None:
        """Give the epoch up; see `Transport.abort`. What MPI still holds goes to the leftovers of the process."""
        with self._lock:
            self._aborted = True
            inflight, self._inflight = self._inflight, set()
            inbound, self._inbound = self._inbound, {}
        self._links.abort()
        leftovers = self.world.leftovers
        for message in inflight:
            unmet = message.abandon()
            if message.inbound is not None and message.inbound.stream is not None:
                message.inbound.stream.count -= unmet
            if not message.over():
                leftovers.keep(message)
        for one in inbound.values():
            if one.stream is not None:
                leftovers.remember(one.stream)

    def close(self) -> None:
        """Free everything; see `Transport.close`. Memory that MPI still holds stays referenced until it lets go."""
        with self._lock:
            clean = not self._inflight
        if clean:  # let notes on their way out go
            self._links.close()
        self.abort()
        self._links.close()

    def refuse(self) -> None:
        """Raise TransportLost if the epoch was aborted."""
        if self._aborted:
            raise TransportLost("the transport of this epoch was aborted")

    def settled(self, message: Message) -> None:
        """Take note that a transfer is over: its memory is the caller's again."""
        with self._lock:
            self._inflight.discard(message)

    def lost(self, error: Exception, peer: int) -> TransportLost:
        """Return what to raise for the library's `error` on a transfer with `peer`."""
        if self._aborted:
            return TransportLost("the transport of this epoch was aborted")
        return TransportLost(f"{self.world.library} lost rank {peer}: {error}", peer)

    def _progress(self) -> None:
        with self._lock:
            inflight = list(self._inflight)
        for message in inflight:
            message.nudge()
        if not inflight:
            self.world.progress()

    def _post(self, message: Message, stream: Stream) -> None:
        """Hand a message to MPI, in pieces where it is long. Called under the lock."""
        data = message.data
        assert data is not None
        comm = self.world.universes[stream.place.universe].comm
        post: Callable[..., Any] = comm.Irecv if message.sent_on is None else comm.Isend
        requests = []
        try:
            for start in range(0, data.nbytes, MOST_BYTES):
                size = min(MOST_BYTES, data.nbytes - start)
                memory = self.world.memory(data.data_ptr() + start, size)
                with self.world.guard:
                    requests.append(post(memory, stream.place.rank, stream.tag))
                stream.add(size)
        except self.world.failure as error:
            raise self.lost(error, message.peer) from None
        finally:
            message.posted(requests)

    def _place(self, peer: int) -> Place:
        place = self._places.get(peer)
        if place is None:
            raise TransportLost(f"rank {peer} is of another MPI job", peer)
        return place

    def _reachable(self, hello: Hello) -> bool:
        """Whether MPI reaches that process, or can."""
        return self.world.find(hello.places) is not None or self.world.may_meet(hello.job)

    def _meet(self, peer: int, deadline: float) -> Place:
        """Come to a communicator with a peer that was not started together with us."""
        world, accept = self.world, self.rank < peer
        try:
            if accept:
                port = mpi_spawn.open_port(world)
                self._links.send(peer, port.encode(), _PORT)
            else:
                port = self._links.recv(peer, _PORT, max(0.0, deadline - time.monotonic())).decode()
            left = max(0.0, deadline - time.monotonic())
            world.add(mpi_spawn.meet(world, port, accept, left, lambda: self._aborted))
        except (OperationTimeout, UnicodeDecodeError, world.failure) as error:
            self.refuse()
            raise TransportLost(f"rank {peer} did not connect by MPI: {error}", peer) from None
        return Place(port, 0)

    def _tell(self, deadline: float) -> dict[int, Hello]:
        """Tell all peers where we are and what we still send; return what they say, and what we do, by rank."""
        world = self.world
        places = {name: universe.rank for name, universe in world.universes.items()}
        hellos = {self.rank: Hello(world.job.name, places, world.leftovers.owed())}
        data = msgspec.msgpack.encode(hellos[self.rank])
        peers = [peer for peer in range(self.size) if peer != self.rank]
        for peer in peers:
            self._links.send(peer, data, _HELLO)
        for peer in peers:
            try:
                note = self._links.recv(peer, _HELLO, max(0.0, deadline - time.monotonic()))
                hellos[peer] = msgspec.msgpack.decode(note, type=Hello)
            except (OperationTimeout, msgspec.DecodeError) as error:
                raise TransportLost(f"rank {peer} did not tell its place in MPI: {error}", peer) from None
        return hellos

    def _refuse_if_gone(self, hellos: Iterable[Hello]) -> None:
        job = self.world.job.name
        gone = self.world.missing(self._run, {hello.places[job] for hello in hellos if job in hello.places})
        if gone and not self.world.recovers:
            self.world.refusal = Unsupported(
                f"a member is gone (rank {', '.join(map(str, sorted(gone)))} of the MPI job), and {self.world.library} "
                "cannot go on without it. Inputs are untouched. Run under Open MPI 5 with `mpirun --with-ft ulfm`, or "
                "use the transport gloo or sockets"
            )
            raise self.world.refusal

    def _clear(self, peer: int, hello: Hello) -> None:
        """Receive what a peer still sends us from former epochs."""
        try:
            self.world.leftovers.discard(hello.places, hello.owed)
        except self.world.failure as error:
            raise self.lost(error, peer) from None
