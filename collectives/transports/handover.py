"""Members of one host hand each other descriptors over their fresh links; used by the shared-memory transport."""

import os
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from collectives.errors import TransportLost

_CREDENTIALS = struct.Struct("3i")
_GREETING = b"d"


class Handed(NamedTuple):
    """What a peer handed over."""

    descriptors: tuple[int, ...]
    pid: int
    """Its process id in our own namespace, as the kernel tells it; 0 if it cannot be seen from here."""


def hand_over(
    sockets: Mapping[int, socket.socket], descriptors: Sequence[int], wake: int, deadline: float
) -> dict[int, Handed]:
    """Give these descriptors to every peer, and return as many from each, by rank. Before anything else is sent.

    Args:
        sockets: connected, authenticated, non-blocking, by rank of the peer.
        descriptors: what to hand over.
        wake: a descriptor that turns readable when this must end.
        deadline: on the monotonic clock.

    Raises:
        TransportLost: woken up (`peer` None); a peer is on another host, went, or did not hand over in time.

    """
    handed: dict[int, Handed] = {}
    try:
        for peer, sock in sockets.items():
            if sock.family != socket.AF_UNIX:
                raise TransportLost(f"rank {peer} is not on this host: its memory cannot be shared", peer)
            socket.send_fds(sock, [_GREETING], descriptors)
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        missing = {sock.fileno(): peer for peer, sock in sockets.items()}
        for fileno in missing:
            poll.register(fileno, select.POLLIN)
        while missing:
            left = deadline - time.monotonic()
            events = poll.poll(max(0.0, left) * 1000)
            if not events:
                raise TransportLost("shared memory was not handed over in time", min(missing.values()))
            for fileno, _ in events:
                if fileno == wake:
                    raise TransportLost("linking with the peers was aborted")
                peer = missing.pop(fileno)
                poll.unregister(fileno)
                handed[peer] = _take(sockets[peer], peer, len(descriptors))
    except OSError as error:
        close_all(handed)
        raise TransportLost(f"shared memory could not be handed over: {error}") from None
    except TransportLost:
        close_all(handed)
        raise
    return handed


def close_all(handed: Mapping[int, Handed]) -> None:
    """Close the descriptors."""
    for one in handed.values():
        for descriptor in one.descriptors:
            os.close(descriptor)


def _take(sock: socket.socket, peer: int, count: int) -> Handed:
    greeting, descriptors, _, _ = socket.recv_fds(sock, len(_GREETING), count)
    if greeting != _GREETING or len(descriptors) != count:
        for descriptor in descriptors:
            os.close(descriptor)
        raise TransportLost(f"rank {peer} closed its link, or handed over no shared memory", peer)
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Handed(tuple(descriptors), _CREDENTIALS.unpack(credentials)[0])
