"""A transport that keeps to a topology: any other transport, with every message delayed as that network would.

Chosen as `transport="emulated:sockets"` (or another one behind the colon) with the option `topology`; all members run
on one host. The bytes themselves travel at once, ahead of their time; with each message goes the instant at which it is
due by `collectives.crossing`, and the receiver sleeps until then. On a port that nothing else uses at the moment

    done = max(now, busy) + latency + bytes / bandwidth

Rank `r` of an epoch is rank `r` of the topology.

Sleeping is late by a tenth of a millisecond and by more on a busy machine, and moving the bytes takes time as well. So
that this does not add up from message to message, "now" is not the clock's time but that at which the sending thread
would be if everything it received had come on the dot and sending took no time (up to PATIENCE behind the clock).
"""

import hashlib
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from collectives.crossing import Route, cross, jitter_of, route_of
from collectives.errors import OperationTimeout, OptionError, TransportLost, Unsupported
from collectives.topology import Topology
from collectives.topology_file import load
from collectives.transports.base import Pending, Transport
from collectives.transports.ledger import Ledger

PREFIX = "emulated:"
"""Before the name of the transport to be wrapped."""
PATIENCE = 0.05
"""Seconds that a thread may be behind the clock without being taken for slow."""
_STAMP = struct.Struct("<d")


def network(path: str) -> Topology:
    """Read the topology that members are to be held to.

    Raises:
        UsageError: there is no such file, or it is no topology; or none is named.

    """
    if not path:
        raise OptionError(
            "an emulated transport needs option topology: the path of a topology file (or RINGHOLD_TOPOLOGY)"
        )
    return load(Path(path))


def emulate(inner: Transport, topology: Topology, key: bytes, epoch: int, nonce: bytes) -> "EmulatedTransport":
    """Wrap the transport of an epoch, which key, number and nonce tell from all others."""
    named = hashlib.blake2b(b"%d %s" % (epoch, nonce), key=key, digest_size=16, person=b"ringhold ledger")
    return EmulatedTransport(inner, topology, named.hexdigest())


class Connectable(Protocol):
    """What a transport must have besides to be wrapped."""

    def connect(self, timeout: float) -> None:
        """Link with all peers."""


@dataclass(slots=True)
class Traffic:
    """Bytes of payload exchanged with each rank, exact, free to read at any time.

    `tensors` counts what operations move: bulk, and what the engine sends inline. `notes` counts all else: headers,
    confirmations, notifications, and rows so small (up to `engine.PACK_BYTES`) that several share a note. What the
    emulation itself adds is not counted.
    """

    tensors_sent: list[int] = field(default_factory=list)
    tensors_received: list[int] = field(default_factory=list)
    notes_sent: list[int] = field(default_factory=list)
    notes_received: list[int] = field(default_factory=list)

    @classmethod
    def none(cls, ranks: int) -> "Traffic":
        """Nothing so far."""
        return cls(*([0] * ranks for _ in range(4)))


class _Leaving(Pending):
    """A message that is on its way out until `left`."""

    def __init__(self, transport: "EmulatedTransport", left: float, inner: Pending | None = None) -> None:
        self._transport, self._left, self._inner = transport, left, inner

    def wait(self) -> None:
        """See `Pending.wait`."""
        if self._inner is not None:
            self._inner.wait()
        self._transport.sleep_until(self._left)


class _Arriving(Pending):
    """A bulk receive, into memory that has room for the stamp as well."""

    def __init__(self, transport: "EmulatedTransport", peer: int, inner: Pending, packed: Tensor, into: Tensor) -> None:
        self._transport, self._peer, self._inner = transport, peer, inner
        self._packed, self._into = packed, into

    def wait(self) -> None:
        """See `Pending.wait`."""
        begun = self._transport.now()
        self._inner.wait()
        (due,) = _STAMP.unpack(self._packed[: _STAMP.size].numpy().tobytes())
        self._into.copy_(self._packed[_STAMP.size :])
        self._transport.traffic.tensors_received[self._peer] += self._into.numel()
        self._transport.arrive(begun, due)


class _Clock(threading.local):
    """How far each thread is behind the time at which it would be had everything come on the dot, and since when."""

    behind = 0.0
    since = 0.0


class EmulatedTransport(Transport):
    """Wraps the transport of an epoch.

    Args:
        inner: what moves the bytes; connected, aborted and closed by this one.
        topology: how fast.
        name: of the epoch; all its members give the same, and no others.

    """

    def __init__(self, inner: Transport, topology: Topology, name: str) -> None:
        self.rank, self.size = inner.rank, inner.size
        self.inline_limit, self.segment_bytes = inner.inline_limit, inner.segment_bytes
        self.traffic = Traffic.none(inner.size)
        self._inner, self._topology, self._name = inner, topology, name
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None
        self._routes: dict[int, Route] = {}
        self._jitter: dict[int, float] = {}
        self._entered = [0.0] * inner.size
        self._due = [0.0] * inner.size
        self._posted = [0] * inner.size
        self._early: dict[tuple[int, int], float] = {}
        self._clock = _Clock()

    def connect(self, timeout: float) -> None:
        """Link with all peers.

        Raises:
            Unsupported: the epoch has more members than the topology has ranks.
            TransportLost: as the wrapped transport's.

        """
        topology = self._topology
        if self.size > topology.ranks:
            raise Unsupported(
                f"an epoch of {self.size} members on topology {topology.name!r}, which has {topology.ranks} ranks; "
                f"describe a larger network (option topology)"
            )
        for peer in range(self.size):
            if peer != self.rank:
                self._routes[peer] = route_of(topology, self.rank, peer)
                self._jitter[peer] = jitter_of(topology, self.rank, peer)
        self._ledger = Ledger(self._name, len(topology.ports), self._stop.is_set)
        try:
            connect: Connectable = self._inner  # type: ignore[assignment]  # all that are built have it
            connect.connect(timeout)
        finally:
            self._ledger.unlink()  # who is linked with all knows that all have opened it

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Post a bulk send; see `Transport.send`. Its `wait` returns when the last byte has left this rank."""
        now = self.now()
        raw = data.view(torch.uint8)
        left, due = self._dispatch(peer, raw.numel(), now)
        packed = torch.empty(_STAMP.size + raw.numel(), dtype=torch.uint8)
        packed[: _STAMP.size] = torch.frombuffer(bytearray(_STAMP.pack(due)), dtype=torch.uint8)
        packed[_STAMP.size :] = raw
        self.traffic.tensors_sent[peer] += raw.numel()
        pending = self._inner.send(peer, packed, channel)
        self._set(now)
        return _Leaving(self, left, pending)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Post a bulk receive; see `Transport.recv`."""
        raw = into.view(torch.uint8)
        packed = torch.empty(_STAMP.size + raw.numel(), dtype=torch.uint8)
        return _Arriving(self, peer, self._inner.recv(peer, packed, channel), packed, raw)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note; see `Transport.send_note`."""
        self._send(peer, note, channel)
        self.traffic.notes_sent[peer] += len(note)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """Post a note; see `Transport.post_note`. Its `wait` returns when the last byte has left this rank."""
        left = self._send(peer, note, channel)
        self.traffic.tensors_sent[peer] += len(note)
        return _Leaving(self, left)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Receive a note; see `Transport.recv_note`."""
        begun = self.now()
        due = self._stamp(peer, channel, timeout)
        note = self._inner.recv_note(peer, channel)
        self.traffic.notes_received[peer] += len(note)
        self.arrive(begun, due)
        return note

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """Receive a note into memory; see `Transport.recv_note_into`."""
        begun = self.now()
        due = self._stamp(peer, channel, None)
        self._inner.recv_note_into(peer, into, channel)
        self.traffic.tensors_received[peer] += len(into)
        self.arrive(begun, due)

    def abort(self) -> None:
        """Give the epoch up; see `Transport.abort`. Sleepers wake at once."""
        self._stop.set()
        self._inner.abort()

    def close(self) -> None:
        """Free everything; see `Transport.close`."""
        self._inner.close()
        self._stop.set()
        with self._lock:
            ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()

    def now(self) -> float:
        """Where this thread would be, on the monotonic clock, had everything come on the dot.

        Who has received nothing for a while is where he wants to be.
        """
        now = time.monotonic()
        return now - self._clock.behind if now - self._clock.since < PATIENCE else now

    def sleep_until(self, instant: float) -> None:
        """Sleep; return at once if the instant has passed. TransportLost: aborted."""
        wait = instant - time.monotonic()
        if self._stop.wait(wait) if wait > 0 else self._stop.is_set():
            raise TransportLost("the transport of this epoch was aborted")

    def arrive(self, begun: float, due: float) -> None:
        """Sleep until a message is due that this thread has waited for since `begun` (by `now`)."""
        self.sleep_until(due)
        self._set(max(begun, due))

    def _set(self, now: float) -> None:
        """Make it that instant for this thread, if that is not too long ago."""
        self._clock.since = time.monotonic()
        self._clock.behind = min(PATIENCE, max(0.0, self._clock.since - now))

    def _send(self, peer: int, note: bytes | memoryview, channel: int) -> float:
        """Send a stamp and a note behind it; when the note's last byte leaves."""
        now = self.now()
        left, due = self._dispatch(peer, len(note), now)
        self._inner.send_note(peer, _STAMP.pack(due), channel)
        self._inner.send_note(peer, note, channel)  # which copies, so that nobody has to wait for the kernel
        self._set(now)
        return left

    def _stamp(self, peer: int, channel: int, timeout: float | None) -> float:
        """When the next note is due; it is here, or as good as.

        Raises:
            OperationTimeout: not in so many seconds.

        """
        deadline = None if timeout is None else time.monotonic() + timeout
        due = self._early.pop((peer, channel), None)
        if due is None:
            (due,) = _STAMP.unpack(self._inner.recv_note(peer, channel, timeout))
        if deadline is not None and due > deadline:
            self._early[peer, channel] = due
            self.sleep_until(deadline)
            raise OperationTimeout(f"no note from rank {peer} on channel {channel} in {timeout} s")
        return due

    def _dispatch(self, peer: int, nbytes: int, now: float) -> tuple[float, float]:
        """Let a message enter the network; when its last byte has left this rank, and when it has arrived."""
        with self._lock:
            ledger = self._ledger
            if ledger is None:
                raise TransportLost("the transport of this epoch was closed")
            with ledger:
                left, due = cross(
                    self._routes[peer],
                    nbytes,
                    max(now, self._entered[peer]),
                    lambda port, head, seconds: ledger.reserve(port, head, seconds, now - PATIENCE),
                )
            self._entered[peer] = left
            self._due[peer] = max(self._due[peer], due + self._jitter[peer] * self._draw(peer))
            return left, self._due[peer]

    def _draw(self, peer: int) -> float:
        """The next of the random numbers of this link, in [0, 1): they follow from the topology's seed alone."""
        if not self._jitter[peer]:
            return 0.0
        self._posted[peer] += 1
        text = f"{self._topology.seed} {self.rank} {peer} {self._posted[peer]}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
