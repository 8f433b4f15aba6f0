"""Notes between the members of one epoch: a full mesh of connections without a thread of its own.

Built by a transport for each epoch; used by every lane of it (a lane is a channel), and by the store over which gloo
finds its peers. Whoever waits moves the bytes of all: one of the waiting threads leads, that is, polls all links, reads
what comes and hands it to the others, and writes what could not be written at once. So a round trip costs two system
calls a side and no thread switch, and two members that send at once cannot block each other.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from collectives.errors import OperationTimeout, ProtocolError, TransportLost
from collectives.transports.base import DONE, Pending
from collectives.transports.frames import LANDED, LARGE, Link
from collectives.transports.handover import Handed, hand_over
from collectives.transports.handshake import Handshake
from collectives.transports.mesh import MeshBuilder
from collectives.transports.site import Site

T = TypeVar("T")

_Key = tuple[int, int, int]
"""What a thread waits for: (peer, channel, 0), (peer, _SENT, number of the note) or (own rank, _LOSS, 0)."""
_SENT, _LOSS = -1, -2

_DRAIN_SECONDS = 0.5


class Posted(Pending):
    """A note that the kernel did not take at once."""

    __slots__ = ("links", "number", "peer")

    def __init__(self, links: "PeerLinks", peer: int, number: int) -> None:
        self.links = links
        self.peer = peer
        self.number = number

    def wait(self) -> None:
        """Wait until the kernel has all of it; see `Pending.wait`."""
        self.links.sent(self.peer, self.number)


class PeerLinks:
    """The links of one member of an epoch with all others. `abort` may be called at any time, also during `connect`."""

    def __init__(self, site: Site) -> None:
        self.rank = site.rank
        self.size = site.size
        self._checked = site.checked

        def handshake(peer: int | None) -> Handshake:
            return Handshake(site.key, site.epoch, site.nonce, site.rank, site.size, peer)

        self._abort_read, self._abort_write = os.pipe()  # readable once aborted: nobody ever reads it
        self._nudge_read, self._nudge_write = os.pipe()  # makes the leader look again at what it polls
        self._builder: MeshBuilder | None = MeshBuilder(
            site.listener, site.rank, site.addresses, handshake, self._abort_read
        )
        self._links: dict[int, Link] = {}
        self._by_fd: dict[int, Link] = {}
        self._poll = select.poll()
        self._mutex = threading.Lock()
        self._leading = False
        self._waiting: dict[_Key, threading.Lock] = {}
        self._inbox: dict[tuple[int, int], deque[bytes]] = {}
        self._aborted = False
        self._closed = False
        self._flushing: set[int] = set()
        self._flushers: list[threading.Thread] = []

    def connect(self, timeout: float, descriptors: Sequence[int] = ()) -> dict[int, Handed]:
        """Link with every other rank. Call it once, before anything else but `abort` and `close`.

        `descriptors` are handed to every peer; returns as many of theirs, by rank, where all members gave some.

        Raises:
            TransportLost: aborted (`peer` None), or `peer` did not link in `timeout` seconds.

        """
        builder, self._builder = self._builder, None
        assert builder is not None, "connect is called once"
        deadline = time.monotonic() + timeout
        sockets = builder.build(timeout)
        handed: dict[int, Handed] = {}
        if descriptors:
            try:
                handed = hand_over(sockets, descriptors, self._abort_read, deadline)
            except BaseException:
                for sock in sockets.values():
                    sock.close()
                raise
        with self._mutex:
            self._links = {peer: Link(sock, peer, self._checked) for peer, sock in sockets.items()}
            self._by_fd = {link.fd: link for link in self._links.values()}
            for fd in (self._abort_read, self._nudge_read, *self._by_fd):
                self._poll.register(fd, select.POLLIN)
        return handed

    def await_loss(self, known: Collection[int]) -> int:
        """Wait until a link is lost other than those `known`, and return the rank of the peer.

        Raises:
            TransportLost: aborted.

        """

        def lost() -> int | None:
            return next((peer for peer, link in self._links.items() if link.lost and peer not in known), None)

        return self._wait((self.rank, _LOSS, 0), lost)

    def send(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note of up to `frames.MAX_NOTE` bytes. Never waits: what the kernel does not take goes out behind.

        Raises:
            TransportLost: aborted (`peer` None), or the link to `peer` is broken.
            ValueError: the note is too long.

        """
        self._refuse()
        link = self._links[peer]
        link.write(note, channel, keep=False)
        if link.unsent:
            self.flush_behind(peer)

    def post(self, peer: int, note: memoryview, channel: int) -> Pending:
        """Begin to send a note whose memory stays as it is until it is sent. Errors as with `send`."""
        self._refuse()
        link = self._links[peer]
        number = link.write(note, channel, keep=True)
        if link.is_sent(number):
            return DONE
        self._watch(link)
        return Posted(self, peer, number)

    def sent(self, peer: int, number: int) -> None:
        """Wait until the kernel has all of a note that was posted.

        Raises:
            TransportLost: aborted, or the link to `peer` is broken.

        """
        link = self._links[peer]
        if not link.is_sent(number):
            self._wait((peer, _SENT, number), lambda: link.is_sent(number) or None)

    def flush_behind(self, peer: int) -> None:
        """See to it that what is under way to `peer` goes out even if nobody waits here meanwhile."""
        self._watch(self._links[peer])
        with self._mutex:
            if peer in self._flushing:
                return
            self._flushing.add(peer)
            flusher = threading.Thread(target=self._flush, args=(peer,), name="ringhold-flush", daemon=True)
            self._flushers = [thread for thread in self._flushers if thread.is_alive()]
            self._flushers.append(flusher)
            flusher.start()

    def recv(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Return the next note from `peer` on `channel`. One thread at a time for each of these.

        Raises:
            TransportLost: aborted (`peer` None), or the link to `peer` is lost and nothing that it brought is left.
            OperationTimeout: nothing came in `timeout` seconds.

        """
        return self._wait((peer, channel, 0), lambda: self._next(peer, channel), timeout)

    def recv_into(self, peer: int, channel: int, into: memoryview) -> None:
        """Receive the next note from `peer` on `channel` into this memory, directly where possible.

        After an error the memory may be written to until `close` has returned; it is referenced until then.

        Raises:
            TransportLost: as `recv`.
            ProtocolError: the note has another length.

        """
        note = self._wait((peer, channel, 0), lambda: self._next(peer, channel, into))
        if note is LANDED:
            return
        if len(note) != len(into):
            raise ProtocolError(f"rank {peer} sent {len(note)} bytes inline where {len(into)} were due")
        into[:] = note

    def abort(self) -> None:
        """Make everything that waits here, and every later call, raise TransportLost. Idempotent, does not block."""
        with self._mutex:
            if self._aborted:
                return
            self._aborted = True
            os.write(self._abort_write, b"x")
            self._wake_all()

    def close(self) -> None:
        """Let notes on their way out go (for half a second at most), then abort and close all connections."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            flushers = list(self._flushers)
        drained = time.monotonic() + _DRAIN_SECONDS
        for flusher in flushers:
            if not self._aborted:
                flusher.join(max(0.0, drained - time.monotonic()))
        self.abort()
        gone = time.monotonic() + _DRAIN_SECONDS
        while (self._leading or self._waiting) and time.monotonic() < gone:
            time.sleep(0.0005)
        for link in self._links.values():
            link.close()
        for fd in (self._abort_read, self._abort_write, self._nudge_read, self._nudge_write):
            os.close(fd)
        self._inbox.clear()

    def _refuse(self) -> None:
        if self._aborted:
            raise TransportLost("the links of this epoch were aborted")

    def _next(self, peer: int, channel: int, into: memoryview | None = None) -> bytes | None:
        """The next note if it is here; else note down where it is wanted. Called under the mutex."""
        queue = self._inbox.get((peer, channel))
        if queue:
            return queue.popleft()
        link = self._links[peer]
        if link.lost is not None:
            raise TransportLost(link.lost, peer)
        if into is not None and len(into) >= LARGE and not self._leading:
            link.landings[channel] = into
        return None

    def _wait(self, key: _Key, ready: Callable[[], T | None], timeout: float | None = None) -> T:
        """Return what `ready` returns, once that is not None; lead meanwhile, or follow. `ready` is called locked."""
        deadline = None if timeout is None else time.monotonic() + timeout
        mutex = self._mutex
        try:
            while True:
                with mutex:
                    self._refuse()
                    found = ready()
                    if found is not None:
                        return found
                    if deadline is not None and time.monotonic() >= deadline:
                        raise OperationTimeout(f"no note from rank {key[0]} on channel {key[1]} in {timeout} s")
                    follow = self._leading
                    if follow:
                        waiter = self._waiting[key] = threading.Lock()
                        waiter.acquire()
                    else:
                        self._leading = True
                if not follow:
                    self._lead(deadline)
                elif deadline is None:
                    waiter.acquire()
                else:
                    waiter.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            with mutex:
                self._waiting.pop(key, None)
                if self._waiting and not self._leading:
                    _release(next(iter(self._waiting.values())))

    def _lead(self, deadline: float | None) -> None:
        """Poll all links, read and write what is possible, until that changes something for somebody."""
        timeout = None
        news = False
        try:
            while not news:
                if deadline is not None:
                    timeout = max(0.0, deadline - time.monotonic()) * 1000 + 1
                events = self._poll.poll(timeout)
                news = not events
                for fd, event in events:
                    link = self._by_fd.get(fd)
                    if link is None:  # aborted, or something else to poll for
                        news = True
                        if fd == self._nudge_read:
                            os.read(fd, 4096)
                        continue
                    if event & select.POLLOUT:
                        news |= self._write(link)
                    if event & ~select.POLLOUT:
                        news |= self._read(link)
        finally:
            self._leading = False

    def _read(self, link: Link) -> bool:
        notes = link.read()
        if not notes and link.lost is None:
            return False
        with self._mutex:
            for channel, payload in notes:
                key = (link.peer, channel)
                queue = self._inbox.get(key)
                if queue is None:
                    queue = self._inbox[key] = deque()
                queue.append(payload)
                if self._waiting and (waiter := self._waiting.get((link.peer, channel, 0))) is not None:
                    _release(waiter)
            if link.lost is not None:
                self._poll.unregister(link.fd)
                del self._by_fd[link.fd]
                self._wake_all()
        return True

    def _write(self, link: Link) -> bool:
        try:
            link.flush()
        except TransportLost:
            link.unsent = False  # whoever waits for it is told by `is_sent`
        with self._mutex:
            if not link.unsent and link.fd in self._by_fd:
                self._poll.modify(link.fd, select.POLLIN)
            for (peer, what, _), waiter in self._waiting.items():
                if what == _SENT and peer == link.peer:
                    _release(waiter)
        return True

    def _watch(self, link: Link) -> None:
        """Let the leader, now or next, also wait for `link` to take more."""
        with self._mutex:
            if self._aborted:
                return
            if link.fd in self._by_fd:
                self._poll.modify(link.fd, select.POLLIN | select.POLLOUT)
            if self._leading:
                os.write(self._nudge_write, b"x")

    def _wake_all(self) -> None:
        for waiter in self._waiting.values():
            _release(waiter)

    def _flush(self, peer: int) -> None:
        """Thread body: wait, and so perhaps lead, until nothing is under way to `peer`."""
        link = self._links[peer]

        def idle() -> bool | None:
            if link.unsent and link.lost is None:
                return None
            self._flushing.discard(peer)
            return True

        try:
            self._wait((peer, _SENT, 0), idle)
        except TransportLost:
            return  # aborted: nothing goes out any more


def _release(waiter: threading.Lock) -> None:
    if waiter.locked():
        waiter.release()
