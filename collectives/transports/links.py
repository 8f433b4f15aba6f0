"""Notes between the members of one epoch: a full mesh of TCP connections without a thread of its own.

Built by a transport for each epoch, used by every lane of it (a lane is a channel) and by the store over which gloo
finds its peers. Whoever waits for a note reads all the sockets and queues what belongs to others (leader and
followers), so a round trip costs two system calls a side and no thread switch.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence

from collectives.errors import OperationTimeout, TransportLost
from collectives.transports.frames import Link
from collectives.transports.handshake import Handshake
from collectives.transports.mesh import LinkListener, MeshBuilder

ANY_PEER = -1
"""In `recv`, on a channel of `SHARED_CHANNELS` or above: the next note of whichever peer."""
SHARED_CHANNELS = 2**31
"""Notes on channels from here on are queued together, whoever sent them. For the transports' own use."""

_DRAIN_SECONDS = 0.5


class PeerLinks:
    """The links of `rank` in one epoch, with the ranks at `addresses` (own address included, ignored).

    Args:
        listener: where lower ranks take the connections of higher ones; it outlives the epoch.
        rank: this member's rank in the epoch.
        addresses: (host, port) of every rank's listener.
        key: what both ends must hold (`handshake.link_key`).
        epoch: the epoch's number.
        nonce: the epoch's nonce; a link of another epoch, or of the same number in another run, is refused.

    `abort` may be called at any time, also during `connect`.

    """

    def __init__(
        self,
        listener: LinkListener,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        key: bytes,
        epoch: int,
        nonce: bytes,
    ) -> None:
        self.rank = rank
        self.size = len(addresses)

        def handshake(peer: int | None) -> Handshake:
            return Handshake(key, epoch, nonce, rank, len(addresses), peer)

        self._wake_read, self._wake_write = os.pipe()
        self._builder: MeshBuilder | None = MeshBuilder(listener, rank, addresses, handshake, self._wake_read)
        self._links: dict[int, Link] = {}
        self._by_fd: dict[int, Link] = {}
        self._mutex = threading.Lock()
        self._poll = select.poll()
        self._leading = False
        self._inbox: dict[tuple[int, int], deque[bytes]] = {}
        self._waiting: dict[tuple[int, int], threading.Lock] = {}
        self._lost: dict[int, str] = {}
        self._aborted = False
        self._closed = False
        self._flushers: list[threading.Thread] = []

    def connect(self, timeout: float) -> None:
        """Link with every other rank. Call it once, before anything else but `abort` and `close`.

        Raises:
            TransportLost: aborted (`peer` None), or `peer` did not link in `timeout` seconds.

        """
        builder, self._builder = self._builder, None
        assert builder is not None, "connect is called once"
        sockets = builder.build(timeout)
        with self._mutex:
            self._links = {peer: Link(sock, peer) for peer, sock in sockets.items()}
            self._by_fd = {link.fd: link for link in self._links.values()}
            self._poll.register(self._wake_read, select.POLLIN)
            for fd in self._by_fd:
                self._poll.register(fd, select.POLLIN)

    def send(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note of up to `frames.MAX_NOTE` bytes. Never waits: what the kernel does not take goes out behind.

        Raises:
            TransportLost: aborted (`peer` None), or the link to `peer` is broken.
            ValueError: the note is too long.

        """
        if self._aborted:
            raise TransportLost("the links of this epoch were aborted")
        link = self._links[peer]
        if link.write(note, channel):
            flusher = threading.Thread(target=self._flush, args=(link,), name="ringhold-flush", daemon=True)
            with self._mutex:
                self._flushers = [thread for thread in self._flushers if thread.is_alive()]
                self._flushers.append(flusher)
            flusher.start()

    def recv(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Return the next note from `peer` on `channel`. One thread at a time per (peer, channel).

        Raises:
            TransportLost: aborted (`peer` None), or the link to `peer` (for ANY_PEER: any link) is lost and nothing
                that it brought before is left.
            OperationTimeout: nothing came in `timeout` seconds.

        """
        deadline = None if timeout is None else time.monotonic() + timeout
        key = (peer, channel)
        mutex = self._mutex
        try:
            while True:
                with mutex:
                    queue = self._inbox.get(key)
                    if queue:
                        return queue.popleft()
                    self._refuse(peer)
                    waiter = None
                    if self._leading:
                        waiter = self._waiting[key] = threading.Lock()
                        waiter.acquire()
                    else:
                        self._leading = True
                if deadline is not None and time.monotonic() >= deadline:
                    if waiter is None:
                        self._leading = False
                    raise OperationTimeout(f"no note from rank {peer} on channel {channel} in {timeout} s")
                if waiter is None:
                    self._lead(key, deadline)
                elif deadline is None:
                    waiter.acquire()
                else:
                    waiter.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            with mutex:
                self._waiting.pop(key, None)
                self._promote()

    def abort(self) -> None:
        """Make everything that waits here, and every later call, raise TransportLost. Idempotent, does not block."""
        with self._mutex:
            if self._aborted:
                return
            self._aborted = True
            os.write(self._wake_write, b"x")  # never read again: the pipe stays readable for all who poll it
            for waiter in self._waiting.values():
                _release(waiter)

    def close(self) -> None:
        """Let notes on their way out go (for half a second at most), then abort and close all connections."""
        if self._closed:
            return
        self._closed = True
        drained = time.monotonic() + _DRAIN_SECONDS
        for flusher in self._flushers:
            if not self._aborted:
                flusher.join(max(0.0, drained - time.monotonic()))
        self.abort()
        gone = time.monotonic() + _DRAIN_SECONDS
        while self._leading and time.monotonic() < gone:
            time.sleep(0.001)
        for flusher in self._flushers:
            flusher.join(max(0.0, gone - time.monotonic()))
        for link in self._links.values():
            link.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _refuse(self, peer: int) -> None:
        """Raise if nothing can come from `peer` any more. Called under the mutex."""
        if self._aborted:
            raise TransportLost("the links of this epoch were aborted")
        if peer == ANY_PEER:
            peer = min(self._lost, default=ANY_PEER)
        if peer in self._lost:
            raise TransportLost(self._lost[peer], peer)

    def _promote(self) -> None:
        """Wake one follower to take the lead, if nobody has it. Called under the mutex by whoever stops waiting."""
        if self._waiting and not self._leading:
            _release(next(iter(self._waiting.values())))

    def _lead(self, key: tuple[int, int], deadline: float | None) -> None:
        """Read all links until there is something for `key`, or nothing more to hope for, or the deadline is past."""
        timeout = None
        try:
            while True:
                if deadline is not None:
                    timeout = max(0.0, deadline - time.monotonic()) * 1000 + 1
                events = self._poll.poll(timeout)
                if not events:
                    return
                for fd, _ in events:
                    link = self._by_fd.get(fd)
                    if link is not None:
                        self._deliver(link, link.read())
                if self._aborted or self._inbox.get(key) or self._lost:
                    return
        finally:
            self._leading = False

    def _deliver(self, link: Link, notes: list[tuple[int, bytes]]) -> None:
        with self._mutex:
            for channel, note in notes:
                key = (link.peer if channel < SHARED_CHANNELS else ANY_PEER, channel)
                self._inbox.setdefault(key, deque()).append(note)
                if key in self._waiting:
                    _release(self._waiting[key])
            if link.lost is not None and link.peer not in self._lost:
                self._lost[link.peer] = link.lost
                self._poll.unregister(link.fd)
                for (peer, _), waiter in self._waiting.items():
                    if peer in (link.peer, ANY_PEER):
                        _release(waiter)

    def _flush(self, link: Link) -> None:
        """Thread body: write the rest of what `link` did not take at once. Ends when all is written, or lost."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.register(link.fd, select.POLLOUT)
        try:
            while not self._aborted and not link.flush():
                poll.poll()
        except TransportLost:
            return  # whoever reads or writes on this link next is told


def _release(waiter: threading.Lock) -> None:
    if waiter.locked():
        waiter.release()
