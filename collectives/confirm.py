"""The confirmation that ends every attempt (rule R2): nobody completes before everybody has staged.

Called by the communicator when the engine is done, on the operation's channel.
"""

from collectives.errors import ProtocolError
from collectives.transports.base import Transport


def confirm(transport: Transport, channel: int, token: bytes, timeout: float | None = None) -> None:
    """Return when every member of the epoch has called this with the same token.

    A dissemination barrier over notes: ceil(log2(size)) rounds; in round k each rank notifies the one 2^k ahead and
    waits for the one 2^k behind (Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", 1988).
    Having heard all rounds, a rank knows that all were called, whoever dies afterwards.

    Args:
        transport: of the epoch.
        channel: the lane's; nothing else may be waiting on it.
        token: names the attempt.
        timeout: seconds that each round may take; None: for ever.

    Raises:
        TransportLost: a link failed or the epoch was aborted.
        OperationTimeout: a round took too long.
        ProtocolError: a peer confirmed something else.

    """
    distance = 1
    while distance < transport.size:
        transport.send_note((transport.rank + distance) % transport.size, token, channel)
        peer = (transport.rank - distance) % transport.size
        theirs = transport.recv_note(peer, channel, timeout)
        if theirs != token:
            raise ProtocolError(f"rank {peer} confirmed {theirs.hex()} where {token.hex()} was due")
        distance *= 2
