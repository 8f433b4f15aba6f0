"""A member's place in one epoch: what its links and its transport are built from."""

from collections.abc import Sequence
from dataclasses import dataclass

from collectives.transports.mesh import LinkListener


@dataclass(frozen=True, slots=True)
class Site:
    """Everything that a transport has to know of its epoch."""

    listener: LinkListener
    """Where lower ranks take the links of higher ones; it outlives the epoch."""
    rank: int
    addresses: Sequence[tuple[str, int]]
    """(host, port) of every rank's listener, the own one included."""
    key: bytes
    """What both ends of a link must hold (`handshake.link_key`)."""
    epoch: int
    nonce: bytes
    """The epoch's; a link of another epoch, or of the same number in another run, is refused."""
    hostname: str = "127.0.0.1"
    """The local address to listen on."""
    stripes: int = 1
    """Connections between two members that share the bulk, where the transport has such."""
    checked: bool = False
    """Whether tensor data have checksums on the wire."""

    @property
    def size(self) -> int:
        """World size."""
        return len(self.addresses)
