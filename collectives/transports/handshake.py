"""How two members prove to each other, on a fresh connection, that both belong to this epoch of this run.

A pure state machine: bytes in, bytes out, no sockets. `links` drives it. Three messages of fixed size:

    connector -> acceptor   HELLO   magic, version, epoch, from rank, to rank, challenge
    acceptor  -> connector  ANSWER  challenge, proof of the acceptor
    connector -> acceptor   PROOF   proof of the connector

A proof is HMAC-SHA256 under a key derived from the run's token, over the role, the epoch's number and nonce, both ranks
and both challenges: it cannot be replayed, reflected, or carried from one epoch or pair to another.
"""

import hashlib
import hmac
import secrets
import struct

from collectives.errors import ProtocolError

MAGIC = b"RHLK"
VERSION = 2
_HELLO = struct.Struct("<4sHQII16s")
_CHALLENGE = 16
_PROOF = 32


def link_key(token: bytes, run: str) -> bytes:
    """Derive the key that links of run `run` are authenticated with from the run's token."""
    return hmac.digest(token, b"ringhold link key\0" + run.encode(), hashlib.sha256)


class Handshake:
    """One end of a handshake. `rank` is this member; `peer` the other rank, None while an acceptor does not know it.

    Use: send `opening`; then read exactly `want` bytes, hand them to `feed`, send what it returns, until `done`.
    """

    def __init__(self, key: bytes, epoch: int, nonce: bytes, rank: int, size: int, peer: int | None = None) -> None:
        self.peer = peer
        self.done = False
        self.opening = b""
        self.want = _HELLO.size
        self._key = key
        self._epoch = epoch
        self._nonce = nonce
        self._rank = rank
        self._size = size
        self._mine = secrets.token_bytes(_CHALLENGE)
        self._context = b""
        self._connector = peer is not None
        if peer is not None:
            self.opening = _HELLO.pack(MAGIC, VERSION, epoch, rank, peer, self._mine)
            self.want = _CHALLENGE + _PROOF

    def feed(self, data: bytes) -> bytes:
        """Take the next `want` bytes and return the bytes to send; sets `want`, `peer` and `done`.

        Raises:
            ProtocolError: the other end is not a member of this epoch, or not the one expected; drop the connection.

        """
        if self._connector:
            return self._answer(data)
        if self.peer is None:
            return self._hello(data)
        self._verify(b"connector", data)
        self.done = True
        return b""

    def _hello(self, data: bytes) -> bytes:
        magic, version, epoch, source, target, theirs = _HELLO.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise ProtocolError("a connection to the link listener does not speak this protocol; it was dropped")
        if epoch != self._epoch or target != self._rank or not self._rank < source < self._size:
            raise ProtocolError(
                f"a link from rank {source} to rank {target} of epoch {epoch} was offered to rank {self._rank} "
                f"of epoch {self._epoch}; it was dropped"
            )
        self.peer = source
        self._bind(source, target, theirs, self._mine)
        self.want = _PROOF
        return self._mine + self._proof(b"acceptor")

    def _answer(self, data: bytes) -> bytes:
        assert self.peer is not None
        self._bind(self._rank, self.peer, self._mine, data[:_CHALLENGE])
        self._verify(b"acceptor", data[_CHALLENGE:])
        self.done = True
        return self._proof(b"connector")

    def _bind(self, source: int, target: int, connector: bytes, acceptor: bytes) -> None:
        self._context = (
            struct.pack("<4sHQIII", MAGIC, VERSION, self._epoch, source, target, len(self._nonce))
            + self._nonce
            + connector
            + acceptor
        )

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._key, role + b"\0" + self._context, hashlib.sha256)

    def _verify(self, role: bytes, proof: bytes) -> None:
        if not hmac.compare_digest(self._proof(role), proof):
            raise ProtocolError(
                f"rank {self.peer} could not prove that it belongs to epoch {self._epoch}; the link was dropped "
                "(is the run's token the same everywhere?)"
            )
