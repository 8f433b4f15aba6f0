"""The transport of one host: notes through shared memory, tensors read straight from the memory of their owner.

Built by the membership for each epoch. A bulk send publishes where the data are; whoever receives copies them from
there, by process_vm_readv(2), with one copy and no work on the owner's side, or reads them in place where they lie in
registered memory (`arena`). Only reads cross a process border: a peer that was stopped and wakes up late can corrupt
nobody (rule R10), and what it reads it discards, since the owner's word has changed. Nobody spins: who waits sleeps on
the doorbell of its segment (`mailbox`, `futex`). The links hand the segments over, and tell at once when a peer dies.
"""

import os
import struct
import threading
import time
from collections import defaultdict, deque
from typing import NamedTuple

from torch import Tensor

from collectives.arena import Arena, MappedArena, process_arena
from collectives.errors import OperationTimeout, ProtocolError, TransportLost
from collectives.staging import copy_out
from collectives.transports.base import Pending, Transport
from collectives.transports.handover import Handed, close_all
from collectives.transports.links import PeerLinks
from collectives.transports.mailbox import Inbox, Outbox, Segment, make_segment
from collectives.transports.remote import RemoteMemory
from collectives.transports.site import Site

SEGMENT_BYTES = 2**20
_NOTE, _OFFER, _ACK, _HELLO = range(4)
"""Kinds of frames."""
_Offer = struct.Struct("<QQ??")
"""Address, or offset in the arena; bytes; whether it is in the arena; whether its owner waits until it is read."""
_CLOSE_SECONDS = 0.5

_Key = tuple[int, int, int]
"""Peer, kind, channel."""


class _Peer:
    """What this member has of another one."""

    def __init__(self, mine: Segment, theirs: Segment, memory: RemoteMemory, arena: MappedArena, word: bytes) -> None:
        self.segment = theirs
        self.outbox = Outbox(mine, theirs)
        self.inbox = Inbox(mine, theirs)
        self.memory = memory
        self.arena = arena
        self.word = word
        self.reads_us = True
        self.lost = ""


class _Unread(NamedTuple):
    """An offer that its receiver shall acknowledge."""

    copy: Tensor | None
    """In registered memory, for a peer that cannot read the original."""
    awaited: bool


class _Sent(Pending):
    """A bulk send whose memory its receiver still has to read."""

    def __init__(self, transport: "ShmTransport", peer: int, channel: int, data: Tensor) -> None:
        self._transport, self._peer, self._channel = transport, peer, channel
        self._data = data

    def wait(self) -> None:
        self._transport.take(self._peer, _ACK, self._channel)


class _Receive(Pending):
    """A bulk receive: read when it is waited for."""

    def __init__(self, transport: "ShmTransport", peer: int, channel: int, into: Tensor) -> None:
        self._transport, self._peer, self._channel, self._into = transport, peer, channel, into

    def wait(self) -> None:
        self._transport.read(self._peer, self._channel, self._into)

    def borrow(self) -> Tensor | None:
        return self._transport.read(self._peer, self._channel, self._into, borrow=True)

    def verify(self) -> None:
        self._transport.verify(self._peer)


class ShmTransport(Transport):
    """Moves one epoch's bytes within a host."""

    segment_bytes = SEGMENT_BYTES
    lends = True

    def __init__(self, site: Site) -> None:
        self.rank, self.size = site.rank, site.size
        self._epoch, self._nonce = site.epoch, site.nonce
        self._arena: Arena | None = process_arena()
        self._links = PeerLinks(site)
        self._lock = threading.Lock()
        self._arrived: defaultdict[_Key, deque[bytes]] = defaultdict(deque)
        self._unread: defaultdict[tuple[int, int], deque[_Unread]] = defaultdict(deque)
        self._aborted = self._closed = False
        self._inside = 0
        self._mine: Segment | None = None
        self._peers: dict[int, _Peer] = {}
        self._owed: set[int] = set()
        """Peers that have not been told of something, or to which not everything could be written yet."""
        self._watcher: threading.Thread | None = None

    def connect(self, timeout: float) -> None:
        """Link with all peers, map their segments, and find out whose memory can be read.

        Raises:
            TransportLost: aborted (`peer` None); `peer` did not link in `timeout` seconds, or is on another host.

        """
        arena, descriptor = self._registered(), make_segment(self.size)
        try:
            mine = Segment(descriptor, self.size, self.rank, own=True)
            mine.mark(self._nonce, self._epoch, valid=True)
            with self._lock:
                self._mine = mine
            handed = self._links.connect(timeout, (descriptor, arena.descriptor))
        finally:
            os.close(descriptor)
        try:
            peers = {peer: self._map(mine, peer, given) for peer, given in handed.items()}
        finally:
            close_all(handed)
        with self._lock:
            self._peers = peers
            self._refuse()
        for peer, other in peers.items():
            self._tell(peer, _HELLO, 0, struct.pack("?", other.memory.may_read()))
        self._watcher = threading.Thread(target=self._watch, name="ringhold-watch", daemon=True)
        self._watcher.start()
        for peer, other in peers.items():
            other.reads_us = struct.unpack("?", self.take(peer, _HELLO, 0, timeout))[0]

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Publish where the data are; see `Transport.send`."""
        self._offer(peer, data, channel, awaited=True)
        return _Sent(self, peer, channel, data)

    def lend(self, peer: int, data: Tensor, channel: int) -> None:
        """Publish where the data are; see `Transport.lend`."""
        self._offer(peer, data, channel, awaited=False)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Post a bulk receive; see `Transport.recv`. Those of a peer and channel are waited for in this order."""
        return _Receive(self, peer, channel, into)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note; see `Transport.send_note`."""
        self._tell(peer, _NOTE, channel, note)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Receive a note; see `Transport.recv_note`."""
        return self.take(peer, _NOTE, channel, timeout)

    def abort(self) -> None:
        """Give the epoch up; see `Transport.abort`. What peers read of us from now on they discard."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            if self._mine is not None:
                self._mine.mark(self._nonce, self._epoch, valid=False)
                self._mine.doorbell.ring()
        self._links.abort()

    def close(self) -> None:
        """Free everything; see `Transport.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.abort()
        self._links.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        if self._watcher is not None:
            self._watcher.join(_CLOSE_SECONDS)
        while self._inside and time.monotonic() < deadline:
            if self._mine is not None:
                self._mine.doorbell.ring()
            time.sleep(0.0005)
        self._arena = None
        with self._lock:
            if self._inside:
                return  # somebody is still in there; its references keep the memory
            for peer in self._peers.values():
                peer.segment.close()
            self._peers.clear()
            if self._mine is not None:
                self._mine.close()
                self._mine = None
            self._arrived.clear()
            self._unread.clear()

    def take(self, peer: int, kind: int, channel: int, timeout: float | None = None) -> bytes:
        """Wait for the next frame of this kind from `peer` on `channel`; see `Transport.recv_note` for errors."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                self._refuse()
                assert self._mine is not None
                bell = self._mine.doorbell
                count = bell.count[0]
                arrived = self._arrived[peer, kind, channel]
                if not arrived or self._owed:
                    self._collect(peer)
                if arrived:
                    return arrived.popleft()
                if why := self._peers[peer].lost:
                    raise TransportLost(why, peer)
                self._inside += 1
            try:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise OperationTimeout(f"nothing from rank {peer} on channel {channel} in {timeout} s")
                bell.sleep(count, left)
            finally:
                with self._lock:
                    self._inside -= 1

    def read(self, peer: int, channel: int, into: Tensor, borrow: bool = False) -> Tensor | None:
        """Copy what `peer` offers next on `channel` to `into`; to `borrow` it, return it in place where that can be.

        Raises:
            TransportLost: the peer is dead, or its memory means something else by now: its epoch is over.
            ProtocolError: the offer has another length.

        """
        address, count, registered, acknowledge = _Offer.unpack(self.take(peer, _OFFER, channel))
        if count != into.nbytes:
            raise ProtocolError(f"rank {peer} sent {count} bytes where {into.nbytes} were due")
        other = self._peer(peer)
        if registered:
            data = other.arena.view(address, into)
            if borrow and not acknowledge:
                return data
            copy_out(data, into)
            self.verify(peer)
        else:
            try:
                good = other.memory.read(address, into.data_ptr(), count)
            except OSError as error:
                raise TransportLost(f"the memory of rank {peer} cannot be read: {error.strerror}", peer) from None
            if not good:
                raise TransportLost(f"rank {peer} has given this epoch up")
        if acknowledge:
            self._tell(peer, _ACK, channel, b"")
        return None

    def verify(self, peer: int) -> None:
        """Raise TransportLost unless the memory of `peer` still means what it said."""
        with self._lock:
            self._refuse()
            other = self._peers[peer]
            if not other.segment.is_valid(other.word):
                raise TransportLost(f"rank {peer} has given this epoch up")

    def _offer(self, peer: int, data: Tensor, channel: int, awaited: bool) -> None:
        other, arena = self._peer(peer), self._registered()
        offset = arena.offset(data)
        copy = None
        if offset is None and not other.reads_us:
            copy = arena.empty(data.numel(), data.dtype).copy_(data)
            offset = arena.offset(copy)
        acknowledge = awaited or copy is not None
        offer = _Offer.pack(data.data_ptr() if offset is None else offset, data.nbytes, offset is not None, acknowledge)
        with self._lock:
            self._refuse()
            if acknowledge:
                self._unread[peer, channel].append(_Unread(copy, awaited))
            other.outbox.put(_OFFER, channel, offer)
            self._owed.add(peer)  # until we wait for anything, or send it a note

    def _tell(self, peer: int, kind: int, channel: int, payload: bytes | memoryview) -> None:
        with self._lock:
            self._refuse()
            other = self._peers[peer]
            if other.lost:
                raise TransportLost(other.lost, peer)
            other.outbox.put(kind, channel, payload)
            self._ring(peer)

    def _collect(self, peer: int) -> None:
        """Take what has come from a peer, and see that what we have to say is heard. Called under the lock."""
        for other in tuple(self._owed):
            self._peers[other].outbox.flush()
            self._ring(other)
        for kind, channel, payload in self._peers[peer].inbox.take():
            if kind != _ACK or self._unread[peer, channel].popleft().awaited:
                self._arrived[peer, kind, channel].append(payload)

    def _ring(self, peer: int) -> None:
        other = self._peers[peer]
        if other.outbox.full:
            self._owed.add(peer)
        else:
            self._owed.discard(peer)
        other.segment.doorbell.ring()

    def _peer(self, peer: int) -> _Peer:
        with self._lock:
            self._refuse()
            return self._peers[peer]

    def _registered(self) -> Arena:
        arena = self._arena
        if arena is None:
            raise TransportLost("the transport of this epoch was closed")
        return arena

    def _refuse(self) -> None:
        if self._aborted:
            raise TransportLost("the transport of this epoch was aborted")

    def _map(self, mine: Segment, peer: int, given: Handed) -> _Peer:
        theirs = Segment(given.descriptors[0], self.size, peer, own=False)
        word = theirs.expects(self._nonce, self._epoch)
        memory = RemoteMemory(given.pid, theirs.word_address, word)
        return _Peer(mine, theirs, memory, MappedArena(given.descriptors[1]), word)

    def _watch(self) -> None:
        """Thread body: tell whoever waits for a peer that it is dead."""
        lost: set[int] = set()
        while True:
            try:
                peer = self._links.await_loss(lost)
            except TransportLost:
                return  # aborted
            lost.add(peer)
            with self._lock:
                if self._aborted:
                    return
                self._peers[peer].lost = f"rank {peer} closed its link"
                assert self._mine is not None
                self._mine.doorbell.ring()
