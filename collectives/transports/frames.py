"""One connection between two members: frames in, frames out, never blocking; `links` owns it and does the waiting.

A note travels as a frame: a header (length u32, channel u32, CRC-32 of the payload, CRC-32 of the header so far) and
the payload. Payloads of up to CHECKED bytes steer the protocol and are always checked. Larger ones are tensor data:
where the run's transport is not a checked one they have zero for a checksum, and go as unprotected as through gloo. A
frame that does not fit its checksums ends the link.
"""

import contextlib
import socket
import struct
import threading
import zlib
from collections import deque

from collectives import faults
from collectives.errors import TransportLost

MAX_NOTE = 2**20
"""Longest payload of a frame, bytes. A longer one on the wire is taken for garbage and ends the link."""
CHECKED = 4096
"""Payloads of up to this many bytes are covered by the checksum."""
LANDED = bytes(bytearray(b"landed"))
"""Stands for a payload that was received straight into its reader's memory; told by identity."""
LARGE = 16 * 1024
"""From this many bytes on it pays to read a payload straight into its reader's memory, at one more system call."""

_HEADER = struct.Struct("<IIII")
_FIELDS = struct.Struct("<III")
_READ = 64 * 1024
_BUFFER = 2**20
_DRAIN_READS = 64


Note = tuple[int, bytes]
"""Channel and payload."""


class _Arriving:
    """A note of which not all bytes are here yet; `own` is its memory where the reader gave none."""

    __slots__ = ("channel", "content", "got", "own", "view")

    def __init__(self, channel: int, length: int, content: int, landing: memoryview | None) -> None:
        self.channel = channel
        self.content = content
        self.got = 0
        self.own = bytearray(length) if landing is None else None
        self.view = memoryview(self.own) if self.own is not None else landing or memoryview(b"")


class Link:
    """A connected, authenticated, non-blocking socket to rank `peer`. One thread at a time reads; any thread writes.

    `checked`: large payloads that are written here get a checksum; those that are read are checked if they have one.
    """

    def __init__(self, sock: socket.socket, peer: int, checked: bool = False) -> None:
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        else:  # TCP sizes its buffers itself, if it is let
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self.fd = sock.fileno()
        self.lost: str | None = None
        """Why nothing more can be read, once that is so."""
        self.landings: dict[int, memoryview] = {}
        """By channel, where the next note is wanted, if it is LARGE. Set while nobody reads; `read` removes it then."""
        self.unsent = False
        """Whether there is something for `flush` to do."""
        self._sock = sock
        self._checked = checked
        self._rest = b""
        self._arriving: _Arriving | None = None
        self._write_lock = threading.Lock()
        self._queue: deque[tuple[int, memoryview]] = deque()
        self._posted = 0
        self._sent = 0
        self._broken: str | None = None

    def read(self) -> list[Note]:
        """Return the notes that are whole now, without waiting. Sets `lost` at the end or on error."""
        notes: list[Note] = []
        try:
            if self._arriving is None:
                self._begin_frames(notes)
            if self._arriving is not None:
                self._go_on(self._arriving, notes)
        except BlockingIOError:
            pass  # that was all for now
        except OSError as error:
            self.lost = f"the link to rank {self.peer} failed: {error}"
        return notes

    def write(self, payload: bytes | memoryview, channel: int, keep: bool) -> int:
        """Send a note, or as much as can be sent without waiting, and queue the rest for `flush`.

        Args:
            payload: up to MAX_NOTE bytes.
            channel: the receiver's.
            keep: whether `payload` stays unchanged until it is sent; else what is left of it is copied.

        Returns:
            Its number: it has been sent when `is_sent(number)`.

        Raises:
            TransportLost: the connection is broken, or the peer has closed it.
            ValueError: the payload is too long.

        """
        length = len(payload)
        if length > MAX_NOTE:
            raise ValueError(f"a note of {length} bytes is longer than {MAX_NOTE}; send it in parts or as bulk")
        fields = _FIELDS.pack(length, channel, _sum(payload) if length <= CHECKED or self._checked else 0)
        header = fields + zlib.crc32(fields).to_bytes(4, "little")
        if faults.damages:
            frame = faults.damaged("data", header + payload)
            header, payload = frame[: _HEADER.size], frame[_HEADER.size :]
        with self._write_lock:
            self._raise_if_over()
            self._posted += 1
            sent = 0
            if not self._queue:
                sent = self._push(header, payload)
                if sent == _HEADER.size + length:
                    self._sent = self._posted
                    return self._posted
            if sent < _HEADER.size:
                self._queue.append((self._posted - 1, memoryview(header)[sent:]))
                sent = _HEADER.size
            rest = payload[sent - _HEADER.size :]
            self._queue.append((self._posted, memoryview(rest if keep else bytes(rest))))
            self.unsent = True
            return self._posted

    def flush(self) -> None:
        """Send what `write` queued, as far as possible without waiting.

        Raises:
            TransportLost: the connection is broken.

        """
        with self._write_lock:
            while self._queue:
                number, rest = self._queue[0]
                sent = self._push(rest, b"")
                if sent < len(rest):
                    self._queue[0] = (number, rest[sent:])
                    return
                self._queue.popleft()
                self._sent = number
            self.unsent = False

    def is_sent(self, number: int) -> bool:
        """Whether the kernel has all of this note.

        Raises:
            TransportLost: not yet, and the connection is broken.

        """
        if self._sent >= number:
            return True
        self._raise_if_over()
        return False

    def close(self) -> None:
        """Close in good order: what was sent still reaches the peer, even if this side has not read everything."""
        with contextlib.suppress(OSError):  # nothing more to read, or broken already: both fine at the end
            for _ in range(_DRAIN_READS):  # closing with unread data would reset the connection and lose what we sent
                if not self._sock.recv(_READ):
                    break
        self._sock.close()
        self._arriving = None
        self._queue.clear()
        self.landings.clear()

    def _begin_frames(self, notes: list[Note]) -> None:
        """Read at the beginning of a frame: all small ones that are there, up to the first that is not whole."""
        data = self._sock.recv(_HEADER.size if self.landings and not self._rest else _READ)
        if not data:
            self.lost = f"rank {self.peer} closed its link"
            return
        data = self._rest + data
        self._rest = b""
        at, end = 0, len(data)
        while end - at >= _HEADER.size:
            length, channel, content, check = _HEADER.unpack_from(data, at)
            start, stop = at + _HEADER.size, at + _HEADER.size + length
            if zlib.crc32(data[at : at + _FIELDS.size]) != check:
                self._damaged()
                return
            if length > MAX_NOTE:
                self.lost = f"rank {self.peer} announced a note of {length} bytes, more than {MAX_NOTE}: garbage"
                return
            if stop > end and length <= CHECKED:
                break  # the rest of it is not worth a buffer of its own
            if stop > end:
                landing = self.landings.get(channel)
                fits = landing is not None and len(landing) == length
                self._arriving = _Arriving(channel, length, content, self.landings.pop(channel) if fits else None)
                self._arriving.got = end - start
                self._arriving.view[: end - start] = data[start:]
                return
            payload = data[start:stop]
            if content and _sum(payload) != content:
                self._damaged()
                return
            notes.append((channel, payload))
            self.landings.pop(channel, None)
            at = stop
        self._rest = data[at:]

    def _go_on(self, note: _Arriving, notes: list[Note]) -> None:
        count = self._sock.recv_into(note.view[note.got :])
        if not count:
            self.lost = f"rank {self.peer} closed its link in the middle of a note"
            return
        note.got += count
        if note.got == len(note.view):
            self._arriving = None
            if note.content and _sum(note.view) != note.content:
                self._damaged()
                return
            # A landing given meanwhile is this note's reader's, never the next one's: that would overwrite it.
            self.landings.pop(note.channel, None)
            notes.append((note.channel, LANDED if note.own is None else bytes(note.own)))

    def _damaged(self) -> None:
        self.lost = f"a note from rank {self.peer} arrived damaged: its checksum does not fit"

    def _raise_if_over(self) -> None:
        why = self._broken or self.lost
        if why is not None:
            raise TransportLost(why, self.peer)

    def _push(self, header: bytes | memoryview, payload: bytes | memoryview) -> int:
        try:
            if len(payload) > CHECKED:
                return self._sock.sendmsg((header, payload))
            return self._sock.send(bytes(header) + payload if payload else header)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._broken = f"the link to rank {self.peer} failed: {error}"
            raise TransportLost(self._broken, self.peer) from None


def _sum(payload: bytes | memoryview) -> int:
    """Checksum of a payload; never zero."""
    return zlib.crc32(payload) or 1
