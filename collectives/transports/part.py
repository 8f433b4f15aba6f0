"""The part of an epoch's transport that the members of a sub-group use, with their ranks counted anew.

Made by `collectives.group` for an attempt of a sub-group's operation: engine and confirmation see a world of the
sub-group's size. It owns nothing: the epoch's transport is aborted and closed by whoever built it.
"""

from collections.abc import Sequence

from torch import Tensor

from collectives.transports.base import Pending, Transport


class PartTransport(Transport):
    """A view of a transport.

    A `TransportLost` keeps naming the rank in the whole epoch: what it tells is the epoch's concern.

    Args:
        whole: the epoch's transport.
        ranks: the sub-group's ranks in it, in the order of their ranks here; this member is one of them.

    """

    def __init__(self, whole: Transport, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = whole, tuple(ranks)
        self.rank, self.size = self._ranks.index(whole.rank), len(self._ranks)
        self.inline_limit, self.segment_bytes, self.lends = whole.inline_limit, whole.segment_bytes, whole.lends

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """See `Transport.send`."""
        return self._whole.send(self._ranks[peer], data, channel)

    def lend(self, peer: int, data: Tensor, channel: int) -> None:
        """See `Transport.lend`."""
        self._whole.lend(self._ranks[peer], data, channel)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """See `Transport.recv`."""
        return self._whole.recv(self._ranks[peer], into, channel)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """See `Transport.send_note`."""
        self._whole.send_note(self._ranks[peer], note, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """See `Transport.recv_note`."""
        return self._whole.recv_note(self._ranks[peer], channel, timeout)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """See `Transport.post_note`."""
        return self._whole.post_note(self._ranks[peer], note, channel)

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """See `Transport.recv_note_into`."""
        self._whole.recv_note_into(self._ranks[peer], into, channel)

    def abort(self) -> None:
        """Leave the epoch alone: only the membership gives it up."""

    def close(self) -> None:
        """Free nothing."""
