"""The interface between the engine, the communicator and whatever moves the bytes of one epoch.

The membership builds one Transport for each epoch and destroys it when the epoch ends; a transport never outlives its
epoch, and never decides who is a member. Two kinds of traffic, independent of each other:

- *bulk* (`send`, `recv`): large contiguous tensors, posted early and waited for later;
- *notes* (`send_note`, `recv_note`): short byte strings: headers, confirmations, small payloads.

A channel is a 31-bit number below `CHANNELS` that keeps the traffic of one lane apart from all others (`channel_of`).
"""

import hashlib
from abc import ABC, abstractmethod
from functools import lru_cache

from torch import Tensor

from collectives.errors import ProtocolError, Unsupported

CHANNELS = 2**31 - 1024
"""Channels are numbers in [0, CHANNELS); those above are the transports' own."""


@lru_cache(maxsize=1024)
def channel_of(lane: str) -> int:
    """Return the channel of the lane named `lane`, the same number in every process.

    Two names may collide (one in 2^31); whoever opens lanes keeps a table and refuses the second.
    """
    digest = hashlib.blake2b(lane.encode(), digest_size=8, person=b"ringhold lane").digest()
    return int.from_bytes(digest, "little") % CHANNELS


class Pending(ABC):
    """A posted bulk send or receive."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the data was sent (the memory may change again) or has arrived whole. Call it once.

        Raises:
            TransportLost: the link failed (`peer` names the other end) or the transport was aborted (`peer` is None).
                The memory stays the transport's until `close` has returned.

        """

    def borrow(self) -> Tensor | None:
        """Wait as `wait` does, for a receive; where its data can be read in place, return them instead of copying.

        They stay there while the operation is under way. Call `verify` after the last look at them.
        """
        self.wait()
        return None

    def verify(self) -> None:  # noqa: B027 - copies need none
        """Raise TransportLost unless what `borrow` returned has been the same all the time (rule R10)."""


class Done(Pending):
    """An operation that was over when it was posted."""

    def wait(self) -> None:
        """Return at once."""


DONE = Done()


class Transport(ABC):
    """Moves bytes between the members of one epoch; ranks are the epoch's ranks.

    A channel is used by one thread at a time; different channels may be used by different threads at once. Messages of
    one kind between a pair of ranks on one channel arrive in the order in which they were posted.
    """

    rank: int
    size: int
    inline_limit: int = 0
    """The engine sends transfers of up to this many bytes as notes. The same on every member."""
    segment_bytes: int = 0
    """Into segments of this size, or less, the engine cuts transfers; 0: of its own. The same on every member."""
    lends: bool = False
    """Receivers fetch the data themselves and when they like, so that `lend` and early sends are possible."""

    @classmethod  # noqa: B027 - most need nothing
    def prepare(cls) -> None:
        """Get this process ready for such transports; called when it joins a run, before anything else.

        Raises:
            Unsupported: it cannot have one; the message says what is missing.

        """

    @abstractmethod
    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Post a bulk send of `data` (contiguous, 1-d, not empty). It must not change until `wait` has returned.

        That may be only after its receiver has waited for it: wait for receives first.

        Raises:
            TransportLost: as `Pending.wait`.

        """

    def lend(self, peer: int, data: Tensor, channel: int) -> None:
        """Send data that stay as they are until the operation is confirmed, so that nobody has to wait for the send.

        For transports that have `lends`; errors as with `send`.
        """
        raise Unsupported(f"{type(self).__name__} does not lend; call send, and wait")

    @abstractmethod
    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Post a bulk receive of exactly `into.nbytes` bytes. Both ends must have agreed on the size before.

        Raises:
            TransportLost: as `Pending.wait`.

        """

    @abstractmethod
    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a short message. Never waits for the peer; the bytes were copied when it returns.

        Raises:
            TransportLost: the link failed, or the transport was aborted.
            ValueError: the note is longer than the transport's limit (at least 1 MiB).

        """

    @abstractmethod
    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Return the next note of `peer` on `channel`; wait up to `timeout` seconds for it (None: for ever).

        Notes that arrived before a link failed are still delivered.

        Raises:
            TransportLost: the link failed, or the transport was aborted.
            OperationTimeout: nothing came in time; the transport is as good as before.

        """

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """Send a note whose memory stays as it is until `Pending.wait` has returned. Errors as with `send_note`."""
        self.send_note(peer, note, channel)
        return DONE

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """Receive the next note into this memory of as many bytes; the memory is as with `recv` meanwhile.

        Raises:
            TransportLost: as `recv_note`.
            ProtocolError: the note has another length.

        """
        note = self.recv_note(peer, channel)
        if len(note) != len(into):
            raise ProtocolError(f"rank {peer} sent {len(note)} bytes inline where {len(into)} were due")
        into[:] = note

    @abstractmethod
    def abort(self) -> None:
        """Give the epoch up, from any thread at any time; idempotent, does not block.

        Everything blocked in this transport, or called later, raises TransportLost with `peer` None.
        """

    @abstractmethod
    def close(self) -> None:
        """Abort and free everything; blocks for a short bounded time at most. Idempotent.

        Memory handed to `send` or `recv` that was in flight may be used again only after this returned; a transport
        that could not be torn down in time keeps a reference to that memory for as long as it may be written.
        """
