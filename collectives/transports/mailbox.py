"""Notes through shared memory: each member writes its own segment, the others read it; bells tell of news.

Used by the shared-memory transport, one `Segment` a member and epoch. A segment holds

- the doorbell of its owner, the only word that others write: all they can do by it is wake the owner up;
- the owner's word (rule R10): who it is, in which epoch, and whether its memory still means what it said;
- for each other member a ring of frames to it, with the count of bytes written;
- for each other member how far the owner has read *that member's* ring to it.

A frame is a header (length u32, channel u32, CRC-32 u32, kind u8) and the payload, padded to 16 bytes. The CRC is
seeded with the place in the stream, so that a frame is whole or not there: on machines that reorder stores a reader may
see the count before the bytes; it looks again at the next ring of its bell, and nothing torn or old gets out.
"""

import mmap
import os
import struct
import zlib
from collections import deque

import numpy as np

from collectives.transports.futex import Doorbell
from collectives.transports.remote import WORD_BYTES

RING = 32 * 1024
"""Bytes of a ring. Headers and confirmations fill a tenth of it; what does not fit waits with its sender."""
LONGEST = 8 * 1024
"""Longest payload of a frame; a longer note goes in several."""
MORE = 128
"""Added to a frame's kind: the note goes on in the next frame of that kind and channel."""

_WORD, _TOLD, _COUNTERS = 64, 128, 4096
_ADDRESS = struct.Struct("<Q")
_LINE = 64
_FRAME = struct.Struct("<IIIBxxx")
_SKIP = 2**32 - 1  # as the length: the rest of the ring is empty, go on at its beginning


def _word(nonce: bytes, epoch: int, rank: int, valid: bool) -> bytes:
    return struct.pack("<16sQII", nonce[:16], epoch, rank, valid)


class Segment:
    """The shared memory of member `rank` of an epoch of `size` members; the `descriptor` may be closed after."""

    def __init__(self, descriptor: int, size: int, rank: int, own: bool) -> None:
        self.rank = rank
        self.own = own
        self._size = size
        length = segment_bytes(size)
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        self._bell = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, writable)
        self._map = mmap.mmap(descriptor, length, mmap.MAP_SHARED, writable if own else mmap.PROT_READ)
        self.memory = memoryview(self._map)
        self._counters = self.memory[_COUNTERS : _COUNTERS + 2 * size * _LINE].cast("Q")
        self.doorbell = Doorbell(memoryview(self._bell), _address(self._bell))
        if own:
            _ADDRESS.pack_into(self.memory, _TOLD, _address(self._map) + _WORD)

    @property
    def word_address(self) -> int:
        """Where the owner's word is in the owner's memory."""
        return int(_ADDRESS.unpack_from(self.memory, _TOLD)[0])

    def written(self, peer: int) -> int:
        """Bytes that the owner has written to its ring to `peer`, ever."""
        return self._counters[peer * _LINE // 8]

    def set_written(self, peer: int, count: int) -> None:
        """Publish what was written. The owner only."""
        self._counters[peer * _LINE // 8] = count

    def read(self, peer: int) -> int:
        """Bytes that the owner has read of `peer`'s ring to it, ever."""
        return self._counters[(self._size + peer) * _LINE // 8]

    def set_read(self, peer: int, count: int) -> None:
        """Publish what was read: `peer` may write there again. The owner only."""
        self._counters[(self._size + peer) * _LINE // 8] = count

    def ring_to(self, peer: int) -> int:
        """Where the ring to `peer` begins in the segment."""
        return _rings(self._size) + peer * RING

    def mark(self, nonce: bytes, epoch: int, valid: bool) -> bytes:
        """Write the owner's word and return it. Once it is not valid, what a peer reads of us is discarded."""
        word = _word(nonce, epoch, self.rank, valid)
        self.memory[_WORD : _WORD + WORD_BYTES] = word
        return word

    def expects(self, nonce: bytes, epoch: int) -> bytes:
        """What the owner's word is as long as it is valid."""
        return _word(nonce, epoch, self.rank, True)

    def is_valid(self, expected: bytes) -> bool:
        """Whether the owner's word is this one now."""
        return self.memory[_WORD : _WORD + WORD_BYTES] == expected

    def close(self) -> None:
        """Unmap it."""
        self.doorbell.count.release()
        self._counters.release()
        self.memory.release()
        self._map.close()
        self._bell.close()


class Outbox:
    """The ring of frames to one peer. Under the transport's lock."""

    def __init__(self, mine: Segment, theirs: Segment) -> None:
        self._mine, self._theirs = mine, theirs
        self._memory = mine.memory
        self._start = mine.ring_to(theirs.rank)
        self._written = 0
        self._waiting: deque[tuple[int, int, bytes]] = deque()

    def put(self, kind: int, channel: int, payload: bytes | memoryview) -> None:
        """Write a note, or keep what does not fit until `flush`. The bell is the caller's to ring."""
        length = len(payload)
        if length <= LONGEST and not self._waiting and self._write(kind, channel, payload):
            return
        for at in range(0, max(length, 1), LONGEST):
            more = MORE if at + LONGEST < length else 0
            self._waiting.append((kind + more, channel, bytes(payload[at : at + LONGEST])))
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as it fits."""
        while self._waiting and self._write(*self._waiting[0]):
            self._waiting.popleft()

    @property
    def full(self) -> bool:
        """Whether something waits for the peer to read on."""
        return bool(self._waiting)

    def _write(self, kind: int, channel: int, payload: bytes | memoryview) -> bool:
        length = len(payload)
        need = _FRAME.size + (length + 15) // 16 * 16
        free = RING - (self._written - self._theirs.read(self._mine.rank))
        at = self._written % RING
        if at + need > RING:  # a frame is never cut in two
            rest = RING - at
            if need + rest > free:
                return False
            _FRAME.pack_into(self._memory, self._start + at, _SKIP, 0, _check(b"", 0, self._written), 0)
            self._written += rest
            at = 0
        elif need > free:
            return False
        place = self._start + at
        self._memory[place + _FRAME.size : place + _FRAME.size + length] = payload
        _FRAME.pack_into(self._memory, place, length, channel, _check(payload, channel, self._written), kind)
        self._written += need
        self._mine.set_written(self._theirs.rank, self._written)
        return True


class Inbox:
    """The frames from one peer. Under the transport's lock."""

    def __init__(self, mine: Segment, theirs: Segment) -> None:
        self._mine, self._theirs = mine, theirs
        self._memory = theirs.memory
        self._start = theirs.ring_to(mine.rank)
        self._read = 0
        self._parts: dict[tuple[int, int], list[bytes]] = {}
        self._told = 0

    def take(self) -> list[tuple[int, int, bytes]]:
        """Return the notes that are whole, as (kind, channel, payload)."""
        notes = []
        written = self._theirs.written(self._mine.rank)
        while self._read < written:
            at = self._read % RING
            place = self._start + at
            length, channel, check, kind = _FRAME.unpack_from(self._memory, place)
            skip = length == _SKIP
            payload = b"" if skip else bytes(self._memory[place + _FRAME.size : place + _FRAME.size + length])
            if _check(payload, channel, self._read) != check:
                break  # not all of it is visible yet: its bell has still to ring
            if skip:
                self._read += RING - at
                continue
            self._read += _FRAME.size + (length + 15) // 16 * 16
            self._mine.set_read(self._theirs.rank, self._read)
            if kind & MORE:
                self._parts.setdefault((kind - MORE, channel), []).append(payload)
            elif (kind, channel) in self._parts:
                notes.append((kind, channel, b"".join((*self._parts.pop((kind, channel)), payload))))
            else:
                notes.append((kind, channel, payload))
        if self._read - self._told > RING // 4:
            self._told = self._read
            self._theirs.doorbell.ring()  # the peer may have notes that did not fit
        return notes


def _check(payload: bytes | memoryview, channel: int, position: int) -> int:
    return zlib.crc32(payload, (position * 0x9E3779B1 + channel) & 0xFFFFFFFF)


def make_segment(size: int) -> int:
    """The descriptor of fresh shared memory for a segment: it has no name and ends with its last user."""
    descriptor = os.memfd_create("ringhold-segment", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, segment_bytes(size))
    return descriptor


def segment_bytes(size: int) -> int:
    """Length of the segment of a member of `size`."""
    return _rings(size) + size * RING


def _rings(size: int) -> int:
    return _COUNTERS + -(-2 * size * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def _address(memory: mmap.mmap) -> int:
    """Where it is mapped. PROT_READ memory has an address too, but ctypes will not tell it."""
    return int(np.frombuffer(memory, dtype=np.uint8, count=1).ctypes.data)
