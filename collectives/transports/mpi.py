"""The transport of processes that an MPI launcher started: bulk over MPI, notes over the links.

Built by the membership for each epoch. MPI only carries bytes, by non-blocking point-to-point calls that are polled;
it makes no collective call, so that nothing can hang in it because a rank is dead or stopped, and it has no say in who
is alive. An aborted epoch leaves transfers behind in the library; see `mpi_leftovers`.

Each stream of messages (from one member to another on one channel, in one epoch) has a tag of its own, which the
sender chooses and tells the receiver in a note: what a former epoch left can never be taken for a message of this one.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from torch import Tensor

from collectives.errors import OperationTimeout, TransportLost, Unsupported
from collectives.transports import mpi_world
from collectives.transports.base import CHANNELS, Pending, Transport
from collectives.transports.links import PeerLinks, Posted
from collectives.transports.mpi_leftovers import Owed, Stream
from collectives.transports.mpi_message import Inbound, Message
from collectives.transports.site import Site

INLINE_LIMIT = 2**16
SEGMENT_BYTES = 2**21
"""The best of 256 KiB to 4 MiB on 2 and 4 ranks, by a little: see `benchmarks.mpi`, option --segment."""
MOST_BYTES = 2**30
"""Of one MPI message: its count is a 32-bit number. What is longer goes in pieces."""
_TAGS = 2**31
"""Added to a channel's number: where the tags of its streams are told."""
_HELLO = CHANNELS + 1
_GLANCE = 2e-3
"""Seconds between two looks at MPI while a thread waits for a note."""


class Hello(msgspec.Struct, frozen=True):
    """What the members of an epoch tell each other about their places in MPI.

    `owed` are the sends of former epochs that are not over, by the receiver's rank in the job.
    """

    job: str
    place: int
    owed: dict[int, list[Owed]]


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
        self._places: dict[int, int] = {}  # by rank in the epoch, the rank in the job; foreigners have none
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
        hellos = self._meet(deadline)
        if hellos[0].job != self.world.job:
            raise Unsupported(
                f"this process is no rank of the MPI job that runs here (rank 0's is {hellos[0].job!r}, ours "
                f"{self.world.job!r}): MPI cannot take it in. Start all members with one mpirun, or use the transport "
                "gloo or sockets, which let anybody join"
            )
        native = {rank: hello for rank, hello in hellos.items() if hello.job == self.world.job}
        self._places = {rank: hello.place for rank, hello in native.items()}
        self._refuse_if_gone()
        for rank, hello in native.items():
            self._clear(rank, hello)

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
            self._post(message, self.world.comm.Isend, stream)
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
                self._post(message, self.world.comm.Irecv, inbound.stream)
        return message

    def learn_tag(self, inbound: Inbound) -> None:
        """Wait for the tag of a stream, and post all receives that wait for it. Called by the channel's thread."""
        tag = int.from_bytes(self.recv_note(inbound.peer, inbound.channel + _TAGS))
        with self._lock:
            self.refuse()
            inbound.stream = Stream(inbound.place, tag)
            for message in inbound.unposted:
                self._post(message, self.world.comm.Irecv, inbound.stream)
            inbound.unposted.clear()

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note; see `Transport.send_note`."""
        self._links.send(peer, note, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Receive a note; see `Transport.recv_note`.

        MPI moves what is under way only while somebody calls it, and the peer may wait for just that: so call it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._inflight:
            left = _GLANCE if deadline is None else min(_GLANCE, deadline - time.monotonic())
            try:
                return self._links.recv(peer, channel, max(0.0, left))
            except OperationTimeout:
                if left < _GLANCE:
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

    def _post(self, message: Message, post: Callable[..., Any], stream: Stream) -> None:
        """Hand a message to MPI, in pieces where it is long. Called under the lock."""
        data = message.data
        assert data is not None
        requests = []
        try:
            for start in range(0, data.nbytes, MOST_BYTES):
                size = min(MOST_BYTES, data.nbytes - start)
                memory = self.world.memory(data.data_ptr() + start, size)
                with self.world.guard:
                    requests.append(post(memory, stream.place, stream.tag))
                stream.add(size)
        except self.world.failure as error:
            raise self.lost(error, message.peer) from None
        finally:
            message.posted(requests)

    def _place(self, peer: int) -> int:
        place = self._places.get(peer)
        if place is None:
            raise TransportLost(f"rank {peer} is of another MPI job", peer)
        return place

    def _meet(self, deadline: float) -> dict[int, Hello]:
        """Tell all peers where we are and what we still send; return what they say, and what we do, by rank."""
        world = self.world
        hellos = {self.rank: Hello(world.job, world.rank, world.leftovers.owed())}
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

    def _refuse_if_gone(self) -> None:
        gone = self.world.missing(self._run, set(self._places.values()))
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
            self.world.leftovers.discard(hello.place, hello.owed.get(self.world.rank, []))
        except self.world.failure as error:
            raise self.lost(error, peer) from None
