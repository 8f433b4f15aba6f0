"""The transport of a world of one: there is nobody to send to."""

from torch import Tensor

from collectives.errors import TransportLost
from collectives.transports.base import Pending, Transport


class NoTransport(Transport):
    """Refuses everything; schedules for one rank move nothing."""

    rank = 0
    size = 1

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Refuse."""
        raise self._nobody(peer)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Refuse."""
        raise self._nobody(peer)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Refuse."""
        raise self._nobody(peer)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Refuse."""
        raise self._nobody(peer)

    def abort(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing to free."""

    def _nobody(self, peer: int) -> TransportLost:
        return TransportLost(f"there is no rank {peer} in a world of one", peer)
