"""Frames on one connection between two members: bounded, checked, never blocking. Used by `links`.

A frame is a header (length u32, channel u32, CRC-32 of both and the payload) and the payload. TCP's own checksum
misses one corruption in 65536; CRC-32 costs 30 us for 64 KiB and 0.2 us for a header.
"""

import socket
import struct
import threading
import zlib
from collections import deque

from collectives.errors import TransportLost

MAX_NOTE = 2**20
"""Longest payload of a frame, bytes. A longer one on the wire is taken for garbage and ends the link."""

_HEADER = struct.Struct("<III")
_READ = 96 * 1024
_GATHER = 4096
"""Payloads above this many bytes are gathered by the kernel instead of being copied behind their header."""
_BUFFER = 2**20
_DRAIN_READS = 64


def _check(length: int, channel: int, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, (length * 0x9E3779B1 ^ channel) & 0xFFFFFFFF)


class Link:
    """One authenticated connection to rank `peer`. One thread at a time may read; any thread may write."""

    def __init__(self, sock: socket.socket, peer: int) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, side, _BUFFER)
        self.peer = peer
        self.fd = sock.fileno()
        self.lost: str | None = None
        """Why nothing more can be read, once that is so."""
        self._sock = sock
        self._rest = b""
        self._lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._broken: str | None = None

    def read(self) -> list[tuple[int, bytes]]:
        """Return the whole frames that are there, (channel, payload) each, without waiting. Sets `lost` at the end."""
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return []
        except OSError as error:
            self.lost = f"the link to rank {self.peer} failed: {error}"
            return []
        if not data:
            self.lost = f"rank {self.peer} closed its link"
            return []
        if self._rest:
            data = self._rest + data
        frames = []
        at, end = 0, len(data)
        while end - at >= _HEADER.size:
            length, channel, check = _HEADER.unpack_from(data, at)
            start = at + _HEADER.size
            stop = start + length
            if length > MAX_NOTE:
                self.lost = f"rank {self.peer} announced a note of {length} bytes, more than {MAX_NOTE}: garbage"
                break
            if stop > end:
                break
            payload = data[start:stop]
            if _check(length, channel, payload) != check:
                self.lost = f"a note from rank {self.peer} arrived damaged: its checksum does not fit"
                break
            frames.append((channel, payload))
            at = stop
        self._rest = data[at:] if at < end else b""
        return frames

    def write(self, payload: bytes | memoryview, channel: int) -> bool:
        """Send a frame, or keep the rest of it for `flush`. True: somebody must call `flush` until it returns True.

        Only the first caller that leaves a rest gets True; later ones add to what is being flushed.

        Raises:
            TransportLost: the connection is broken.
            ValueError: the payload is longer than MAX_NOTE.

        """
        length = len(payload)
        if length > MAX_NOTE:
            raise ValueError(f"a note of {length} bytes is longer than {MAX_NOTE}; send it in parts or as bulk")
        header = _HEADER.pack(length, channel, _check(length, channel, payload))
        with self._lock:
            self._raise_if_broken()
            first = not self._unsent
            sent = 0
            if first:
                sent = self._push(header, payload)
                if sent == _HEADER.size + length:
                    return False
            self._unsent.append(memoryview(header + bytes(payload))[sent:])
            return first

    def flush(self) -> bool:
        """Send what `write` left over, as far as possible without waiting; True when nothing is left.

        Raises:
            TransportLost: the connection is broken.

        """
        with self._lock:
            self._raise_if_broken()
            while self._unsent:
                rest = self._unsent[0]
                sent = self._push(rest, b"")
                if sent < len(rest):
                    self._unsent[0] = rest[sent:]
                    return False
                self._unsent.popleft()
            return True

    def close(self) -> None:
        """Close in good order: what was sent still reaches the peer, even if this side has not read everything."""
        try:
            for _ in range(_DRAIN_READS):  # closing with unread data would reset the connection and lose what we sent
                if not self._sock.recv(_READ):
                    break
        except OSError:
            pass  # nothing more to read now, or broken already: both fine at the end
        self._sock.close()

    def _push(self, header: bytes | memoryview, payload: bytes | memoryview) -> int:
        try:
            if len(payload) > _GATHER:
                return self._sock.sendmsg((header, payload))
            return self._sock.send(bytes(header) + payload if payload else header)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._broken = f"the link to rank {self.peer} failed: {error}"
            self._raise_if_broken()
            raise AssertionError("unreachable") from error

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise TransportLost(self._broken, self.peer)
