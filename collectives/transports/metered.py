"""A transport that counts the bytes of operations that it is given to send, around the one that moves them.

Made by `collectives.group` for each attempt and handed to the engine, so that headers and confirmations are not
counted: what is counted is what a schedule says. Plans and the tests of reshard compare it with their formulas.
"""

import threading
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from collectives.transports.base import Pending, Transport


class Meter:
    """Bytes of payload that this member has sent since it joined, repeated attempts included. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._to: Counter[int] = Counter()

    @property
    def total(self) -> int:
        """To all members together."""
        with self._lock:
            return self._to.total()

    @property
    def to(self) -> dict[int, int]:
        """By the id of the member that got them."""
        with self._lock:
            return dict(self._to)

    def add(self, member: int, nbytes: int) -> None:
        """Count what goes to a member."""
        with self._lock:
            self._to[member] += nbytes


class MeteredTransport(Transport):
    """A view of a transport. It owns nothing.

    Args:
        inner: moves the bytes.
        meter: is told of them.
        members: member ids by rank.

    """

    def __init__(self, inner: Transport, meter: Meter, members: Sequence[int]) -> None:
        self._inner, self._meter, self._members = inner, meter, members
        self.rank, self.size = inner.rank, inner.size
        self.inline_limit, self.segment_bytes, self.lends = inner.inline_limit, inner.segment_bytes, inner.lends

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """See `Transport.send`."""
        self._meter.add(self._members[peer], data.nbytes)
        return self._inner.send(peer, data, channel)

    def lend(self, peer: int, data: Tensor, channel: int) -> None:
        """See `Transport.lend`."""
        self._meter.add(self._members[peer], data.nbytes)
        self._inner.lend(peer, data, channel)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """See `Transport.send_note`."""
        self._meter.add(self._members[peer], len(note))
        self._inner.send_note(peer, note, channel)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """See `Transport.post_note`."""
        self._meter.add(self._members[peer], len(note))
        return self._inner.post_note(peer, note, channel)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """See `Transport.recv`."""
        return self._inner.recv(peer, into, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """See `Transport.recv_note`."""
        return self._inner.recv_note(peer, channel, timeout)

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """See `Transport.recv_note_into`."""
        self._inner.recv_note_into(peer, into, channel)

    def abort(self) -> None:
        """Leave the epoch alone: only the membership gives it up."""

    def close(self) -> None:
        """Free nothing."""
