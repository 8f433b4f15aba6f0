"""The store over which gloo's ranks learn each other's addresses, carried by the links of the epoch.

Used by `gloo` while it builds its process group. No server, no open port, nothing to clean up: a `set` is a note to
every peer, a `get` waits for the local copy, and both end when the links are aborted or a peer is lost.
"""

import struct
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from collectives.transports.base import CHANNELS
from collectives.transports.links import PeerLinks

STORE_CHANNEL = CHANNELS
_KEY = struct.Struct("<H")


class LinkStore(Store):
    """Write-once keys shared by all members of an epoch. Used by one thread at a time; values are bytes.

    For gloo's way of meeting only: in each round every rank sets one key and then gets those of all others. `get` and
    `wait` raise OperationTimeout after `patience` seconds in all, counted from the construction, and TransportLost as
    `PeerLinks.recv` does.
    """

    def __init__(self, links: PeerLinks, patience: float) -> None:
        super().__init__()
        self._links = links
        self._peers = [peer for peer in range(links.size) if peer != links.rank]
        self._deadline = time.monotonic() + patience
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Publish `value` under `key` to all members."""
        data = value.encode() if isinstance(value, str) else value
        self._values[key] = data
        name = key.encode()
        note = _KEY.pack(len(name)) + name + data
        for peer in self._peers:
            self._links.send(peer, note, STORE_CHANNEL)

    def get(self, key: str) -> bytes:
        """Return the value of `key`; if it is not there yet, wait for what every peer publishes next."""
        while key not in self._values:
            for peer in self._peers:
                note = self._links.recv(peer, STORE_CHANNEL, max(0.0, self._deadline - time.monotonic()))
                (length,) = _KEY.unpack_from(note)
                name = note[_KEY.size : _KEY.size + length].decode()
                self._values[name] = note[_KEY.size + length :]
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all `keys` are there. `timeout` is ignored in favour of the store's own patience."""
        for key in keys:
            self.get(key)
