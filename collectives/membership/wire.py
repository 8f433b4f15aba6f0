"""The authenticated control channel: handshake and frames over a TCP (or TLS) stream.

Both ends prove that they hold the run's token by an HMAC over two fresh nonces, so a recorded handshake is worth
nothing. After it every frame carries an HMAC under a key of this connection and direction and a counter: a changed,
repeated or foreign frame is refused. A frame is 4 bytes of length (big endian), 16 of HMAC, and the message.
"""

import asyncio
import hashlib
import hmac
import os
import ssl
from pathlib import Path
from typing import TypeVar

from collectives import faults
from collectives.errors import JoinRefused, OptionError, ProtocolError, UsageError
from collectives.membership.protocol import (
    MAX_FRAME,
    NONCE_BYTES,
    VERSION,
    Challenge,
    FromCoordinator,
    Granted,
    Message,
    Proof,
    Refused,
    decode_from_coordinator,
    decode_from_peer,
    encode,
)
from collectives.options import Options

MAX_HANDSHAKE_FRAME = 4096
HANDSHAKE_SECONDS = 5.0
_MAC_BYTES = 16

M = TypeVar("M", bound=FromCoordinator)


def parse_address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT, or RINGHOLD_COORDINATOR where `text` is empty. Raises `UsageError`."""
    text = text or os.environ.get("RINGHOLD_COORDINATOR", "")
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is no coordinator address; give HOST:PORT or set RINGHOLD_COORDINATOR")
    return host.strip("[]"), int(port)


def load_token(token: str | None = None) -> bytes:
    """Return the run's shared token: the argument, else RINGHOLD_TOKEN, else the file that RINGHOLD_TOKEN_FILE names.

    Raises:
        UsageError: none is set, or the file cannot be read.

    """
    token = token or os.environ.get("RINGHOLD_TOKEN", "")
    path = os.environ.get("RINGHOLD_TOKEN_FILE", "")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as error:
            raise UsageError(f"cannot read the token file {path}: {error.strerror}") from None
    if not token:
        raise UsageError("no token: set RINGHOLD_TOKEN, or RINGHOLD_TOKEN_FILE to a file that holds it")
    return token.encode()


def public_nonce(secret: bytes) -> bytes:
    """Return what a member shows of itself; only it knows the secret that this is the digest of."""
    return hashlib.sha256(b"ringhold member" + secret).digest()[:NONCE_BYTES]


def derive_key(token: bytes, purpose: str, *parts: bytes) -> bytes:
    """Derive a 32-byte key for one purpose from the run's token."""
    return hmac.digest(token, b"\0".join([b"ringhold", purpose.encode(), *(p.hex().encode() for p in parts)]), "sha256")


class Channel:
    """A stream after its handshake. `send` does not block; `receive` returns raw message bytes, checked."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send_key: bytes, receive_key: bytes
    ) -> None:
        self._reader, self.writer = reader, writer
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    def send(self, message: Message) -> None:
        """Queue one message."""
        body = encode(message)
        mac = hmac.digest(self._send_key, self._sent.to_bytes(8) + body, "sha256")[:_MAC_BYTES]
        self._sent += 1
        frame = len(body).to_bytes(4) + mac + body
        self.writer.write(faults.damaged("control", frame) if faults.damages else frame)

    async def receive(self) -> bytes:
        """Wait for the next message.

        Raises:
            ProtocolError: the frame is too long or its HMAC is wrong.
            asyncio.IncompleteReadError, OSError: the connection ended.

        """
        head = await self._reader.readexactly(4 + _MAC_BYTES)
        length = int.from_bytes(head[:4])
        if length > MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
        body = await self._reader.readexactly(length)
        mac = hmac.digest(self._receive_key, self._received.to_bytes(8) + body, "sha256")[:_MAC_BYTES]
        if not hmac.compare_digest(mac, head[4:]):
            raise ProtocolError("a frame's checksum is wrong")
        self._received += 1
        return body

    def close(self) -> None:
        """Close after what was sent."""
        self.writer.close()


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, run: str) -> Channel:
    """Coordinator's side of the handshake.

    Raises:
        ProtocolError: the peer is refused (it was told why), or broke the protocol.

    """
    challenge = Challenge(VERSION, os.urandom(NONCE_BYTES))
    _write_plain(writer, challenge)
    proof = decode_from_peer(await _read_plain(reader))
    if not isinstance(proof, Proof):
        raise ProtocolError(f"a peer began with {type(proof).__name__} instead of its proof")
    parts = (run.encode(), challenge.nonce, proof.nonce)
    reason = ""
    if proof.version != VERSION:
        reason = f"the peer speaks version {proof.version}, the coordinator {VERSION}: install the same release"
    elif proof.run != run:
        reason = f"this coordinator serves run {run!r}, not {proof.run!r}"
    elif not hmac.compare_digest(proof.mac, derive_key(token, "proof", *parts)):
        reason = "wrong token: RINGHOLD_TOKEN must be the same for the coordinator and every peer"
    if reason:
        _write_plain(writer, Refused(reason))
        raise ProtocolError(reason)
    _write_plain(writer, Granted(derive_key(token, "granted", *parts)))
    return Channel(reader, writer, derive_key(token, "down", *parts), derive_key(token, "up", *parts))


async def connect(host: str, port: int, token: bytes, run: str, tls: ssl.SSLContext | None) -> Channel:
    """Peer's side: connect and shake hands.

    Raises:
        JoinRefused: the coordinator refused this peer, or has not the token itself, or no certificate that we trust.
        ProtocolError: the other end is no coordinator.
        OSError, asyncio.IncompleteReadError: it cannot be reached.

    """
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    except ssl.SSLCertVerificationError as error:
        raise JoinRefused(
            f"the certificate of the coordinator at {host}:{port} is not to be trusted: {error.verify_message}; check "
            "option tls_ca"
        ) from None
    try:
        challenge = _expect(await _read_plain(reader), Challenge)
        if challenge.version != VERSION:
            raise JoinRefused(
                f"the coordinator at {host}:{port} speaks version {challenge.version}, this peer {VERSION}: "
                "install the same release"
            )
        nonce = os.urandom(NONCE_BYTES)
        parts = (run.encode(), challenge.nonce, nonce)
        _write_plain(writer, Proof(VERSION, run, nonce, derive_key(token, "proof", *parts)))
        granted = _expect(await _read_plain(reader), Granted)
        if not hmac.compare_digest(granted.mac, derive_key(token, "granted", *parts)):
            raise JoinRefused(f"what answers at {host}:{port} does not hold this run's token")
    except BaseException:
        writer.close()
        raise
    return Channel(reader, writer, derive_key(token, "up", *parts), derive_key(token, "down", *parts))


def _expect(data: bytes, kind: type[M]) -> M:
    message = decode_from_coordinator(data)
    if isinstance(message, Refused):
        raise JoinRefused(f"the coordinator refused this peer: {message.reason}")
    if not isinstance(message, kind):
        raise ProtocolError(f"expected {kind.__name__}, got {type(message).__name__}")
    return message


def _write_plain(writer: asyncio.StreamWriter, message: Message) -> None:
    body = encode(message)
    writer.write(len(body).to_bytes(4) + body)


async def _read_plain(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(4))
    if length > MAX_HANDSHAKE_FRAME:
        raise ProtocolError(f"a handshake frame of {length} bytes is over the limit of {MAX_HANDSHAKE_FRAME}")
    return await reader.readexactly(length)


def client_tls(options: Options) -> ssl.SSLContext | None:
    """TLS settings of a peer: on if `tls_ca` is set; the certificate must name the coordinator's host."""
    if not options.tls_ca:
        return None
    try:
        return ssl.create_default_context(cafile=options.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise OptionError(f"option tls_ca: cannot use {options.tls_ca}: {error}") from None


def server_tls(options: Options) -> ssl.SSLContext | None:
    """TLS settings of the coordinator: on if `tls_cert` and `tls_key` are set."""
    if not options.tls_cert and not options.tls_key:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise OptionError(f"options tls_cert and tls_key: cannot use {options.tls_cert!r}: {error}") from None
    return context
