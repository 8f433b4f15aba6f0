"""A transport whose bulk data are checked on arrival: a checksum follows each transfer as a note.

Chosen as `transport="checked:gloo"`; made by `collectives.epochs` around gloo, which checks nothing itself. What goes
over the links, all of `checked:sockets`, is checked there (`frames`). Damage is noticed before an operation is staged:
the link to the sender counts as failed, and the membership decides (rule R11).
"""

import zlib
from typing import Protocol

import torch
from torch import Tensor

from collectives.errors import TransportLost
from collectives.transports.base import Pending, Transport

PREFIX = "checked:"
"""Before the name of the transport to be checked."""
_SUMS = 2**31
"""Added to a channel's number: the channel of its checksums."""


class Connectable(Protocol):
    """What a transport must have besides to be wrapped."""

    def connect(self, timeout: float) -> None:
        """Link with all peers."""


class CheckedTransport(Transport):
    """Wraps the transport of an epoch, and owns it."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.inline_limit, self.segment_bytes = inner.inline_limit, inner.segment_bytes

    def connect(self, timeout: float) -> None:
        """Connect the inner transport."""
        inner: Connectable = self._inner  # type: ignore[assignment]  # all that are built have it
        inner.connect(timeout)

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Post a bulk send; see `Transport.send`."""
        self._inner.send_note(peer, checksum(data), channel + _SUMS)
        return self._inner.send(peer, data, channel)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Post a bulk receive; see `Transport.recv`."""
        return _Checked(self, peer, channel, into, self._inner.recv(peer, into, channel))

    def check(self, peer: int, data: Tensor, channel: int) -> None:
        """Compare what arrived with the checksum that comes with it.

        Raises:
            TransportLost: it does not fit.

        """
        if self._inner.recv_note(peer, channel + _SUMS) != checksum(data):
            raise TransportLost(
                f"{data.nbytes} bytes from rank {peer} arrived damaged: the checksum does not fit", peer
            )

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note; see `Transport.send_note`."""
        self._inner.send_note(peer, note, channel)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """Post a note; see `Transport.post_note`."""
        return self._inner.post_note(peer, note, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Receive a note; see `Transport.recv_note`."""
        return self._inner.recv_note(peer, channel, timeout)

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """Receive a note into memory; see `Transport.recv_note_into`."""
        self._inner.recv_note_into(peer, into, channel)

    def abort(self) -> None:
        """Give the epoch up; see `Transport.abort`."""
        self._inner.abort()

    def close(self) -> None:
        """Free everything; see `Transport.close`."""
        self._inner.close()


class _Checked(Pending):
    """A bulk receive whose data are compared with their checksum when it is waited for."""

    def __init__(self, transport: CheckedTransport, peer: int, channel: int, into: Tensor, inner: Pending) -> None:
        self._transport, self._peer, self._channel, self._into, self._inner = transport, peer, channel, into, inner

    def wait(self) -> None:
        self._inner.wait()
        self._transport.check(self._peer, self._into, self._channel)


def checksum(data: Tensor) -> bytes:
    """CRC-32 of the bytes of a contiguous tensor."""
    return zlib.crc32(data.view(torch.uint8).numpy().data).to_bytes(4)
