"""The store over which gloo's ranks learn each other's addresses, carried by the links of the epoch.

Used by `gloo` while it builds its process group. No server, no open port, nothing to clean up: a `set` is a note to
every peer, a `get` waits for the local copy, and both end when the links are aborted or a peer is lost.
"""

import struct
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from collectives.errors import OperationTimeout
from collectives.transports.links import ANY_PEER, SHARED_CHANNELS, PeerLinks

STORE_CHANNEL = SHARED_CHANNELS
_KEY = struct.Struct("<H")


class LinkStore(Store):
    """Write-once keys shared by all members of an epoch. Used by one thread at a time; values are bytes.

    `get` and `wait` raise OperationTimeout after `patience` seconds in all, counted from the construction, and
    TransportLost as `PeerLinks.recv` does.
    """

    def __init__(self, links: PeerLinks, patience: float) -> None:
        super().__init__()
        self._links = links
        self._deadline = time.monotonic() + patience
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Publish `value` under `key` to all members."""
        data = value.encode() if isinstance(value, str) else value
        self._values[key] = data
        name = key.encode()
        note = _KEY.pack(len(name)) + name + data
        for peer in range(self._links.size):
            if peer != self._links.rank:
                self._links.send(peer, note, STORE_CHANNEL)

    def get(self, key: str) -> bytes:
        """Return the value of `key`; wait for it if it is not there yet."""
        while key not in self._values:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise OperationTimeout(f"no peer published {key!r} in time while the transport was being built")
            note = self._links.recv(ANY_PEER, STORE_CHANNEL, left)
            (length,) = _KEY.unpack_from(note)
            name = note[_KEY.size : _KEY.size + length].decode()
            self._values[name] = note[_KEY.size + length :]
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all `keys` are there. `timeout` is ignored in favour of the store's own patience."""
        for key in keys:
            self.get(key)
