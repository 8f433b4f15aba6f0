"""Confirmation: nobody returns a result before every member has staged it (rule R2)."""

from collectives.algorithms import dissemination
from collectives.errors import ProtocolError
from collectives.transports.base import Transport


def confirm(transport: Transport, channel: int, token: bytes) -> None:
    """Return when every rank has called this with the same `token`: log2(size) rounds of one note each way.

    Raises:
        TransportLost: a link failed or the transport was aborted.
        ProtocolError: a peer confirmed something else.

    """
    for step in dissemination.barrier(transport.size).local(transport.rank).steps:
        for send in step.sends:
            transport.send_note(send.peer, token, channel)
        for recv in step.recvs:
            note = transport.recv_note(recv.peer, channel)
            if note != token:
                raise ProtocolError(f"rank {recv.peer} confirmed {note.hex()} where {token.hex()} was due")
