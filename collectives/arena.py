"""Memory that the members of one host can map: registered buffers, which a peer's reduction reads in place.

`Communicator.empty` takes tensors from it; the shared-memory transport tells peers where in it data are. A process has
one sparse file without a name; pages exist once they are touched, and go when the tensor goes.

A result that was staged here gets into a tensor that lies here without a copy: the two exchange their pages
(`Arena.exchange`). So an address says nothing about the place in the file; `Arena.offset` does.
"""

import ctypes
import mmap
import os
import threading
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collectives.intervals import IntervalMap
from collectives.space import Space

CAPACITY = 2**37
"""Bytes of address space, of which only what is used costs memory."""
SMALLEST_EXCHANGE = 2**19
"""Bytes from which on exchanging pages is faster than copying (some 20 us)."""
MOST_PIECES = 10_000
"""Exchanges leave no more mappings behind than this; a process may have 65,530."""
_PAGE = mmap.PAGESIZE
_MAYMOVE_FIXED_DONTUNMAP = 7
_MAP_FIXED = 16
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """One process' registered memory. For any thread. What was taken from it stays valid when the arena is gone."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ringhold-arena", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, CAPACITY)
        self._memory = mmap.mmap(self.descriptor, CAPACITY)
        self._base = int(np.frombuffer(self._memory, dtype=np.uint8, count=1).ctypes.data)
        self._lock = threading.Lock()
        self._addresses, self._places = Space(CAPACITY), Space(CAPACITY)
        self._moved = IntervalMap(CAPACITY, 0)
        """By place in the address space: how much further on in the file that is."""
        self._scratch: mmap.mmap | None = None

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor of shape (count,), page-aligned.

        Raises:
            MemoryError: all of the arena is in use.

        """
        return torch.from_numpy(self.allocate(count * dtype.itemsize)).view(dtype)

    def allocate(self, count: int) -> npt.NDArray[np.uint8]:
        """Return so many bytes, page-aligned; they go back when nothing refers to them any more. Errors as `empty`."""
        size = max(1, -(-count // _PAGE)) * _PAGE
        start = self._take(size)
        data = np.frombuffer(self._memory, dtype=np.uint8, count=count, offset=start)
        weakref.finalize(data, self._give_back, start, start + size).atexit = False
        return data  # no view of it: what is a view of a view refers to this one

    def offset(self, data: Tensor) -> int | None:
        """Where in the file a contiguous tensor lies; None if it is not one piece there, or lies elsewhere."""
        at = data.data_ptr() - self._base
        if not 0 <= at < CAPACITY:
            return None
        with self._lock:
            moved = self._shift(at, data.nbytes)
        return None if moved is None else at + moved

    def exchange(self, one: Tensor, other: Tensor) -> int:
        """Let two contiguous tensors of as many bytes exchange what they hold, whole pages from the start, uncopied.

        Whoever reads them meanwhile finds the one or the other, page by page; nobody else is to write to them, or to
        have been told of their places in the file. Returns how many bytes were exchanged: none where it is not worth
        it, or cannot be done.
        """
        size = one.nbytes // _PAGE * _PAGE
        if size < SMALLEST_EXCHANGE or other.nbytes != one.nbytes:
            return 0
        at, there = one.data_ptr() - self._base, other.data_ptr() - self._base
        if not (0 <= at < CAPACITY and 0 <= there < CAPACITY) or at % _PAGE or there % _PAGE or abs(at - there) < size:
            return 0
        with self._lock:
            mine, theirs = self._shift(at, size), self._shift(there, size)
            if mine is None or theirs is None or len(self._moved) > MOST_PIECES:
                return 0
            if not self._remap(at, there, size):
                return 0
            self._moved.assign(at, at + size, there + theirs - at)
            self._moved.assign(there, there + size, at + mine - there)
        return size

    def _shift(self, at: int, size: int) -> int | None:
        """How much further on in the file a range of the address space is, if all of it is. Called under the lock."""
        moved = {value for _, _, value in self._moved.pieces(at, at + max(1, size))}
        return moved.pop() if len(moved) == 1 else None

    def _remap(self, at: int, there: int, size: int) -> bool:
        """Let two ranges of the address space exchange their pages; False: this system cannot. Called under the lock.

        Page tables are moved by way of a third range, and what was moved away from stays mapped: there is no moment at
        which a thread that reads there would fault.
        """
        if self._scratch is None:
            self._scratch = mmap.mmap(self.descriptor, CAPACITY)
        aside = int(np.frombuffer(self._scratch, dtype=np.uint8, count=1).ctypes.data) + at
        first, second = self._base + at, self._base + there
        if not _move(first, aside, size) or not _move(second, first, size):
            return False
        if not _move(aside, second, size):
            raise OSError(
                ctypes.get_errno(), "pages of registered memory were lost; this is a defect, please report it"
            )
        return True

    def _take(self, size: int) -> int:
        """Find a free range of the address space, and let it be one piece of the file."""
        with self._lock:
            start = self._addresses.take(size)
            place = None if start is None else self._places.take(size)
            if start is None or place is None:
                if start is not None:
                    self._addresses.give_back(start, start + size)
                raise MemoryError(f"no {size} bytes are left of the {CAPACITY} of registered memory")
            if self._shift(start, size) != place - start:
                _map(self._base + start, size, self.descriptor, place)
                self._moved.assign(start, start + size, place - start)
        return start

    def _give_back(self, start: int, stop: int) -> None:
        self._memory.madvise(mmap.MADV_REMOVE, start, stop - start)
        with self._lock:
            self._addresses.give_back(start, stop)
            for first, last, moved in self._moved.pieces(start, stop):
                self._places.give_back(first + moved, last + moved)


def _map(address: int, size: int, descriptor: int, place: int) -> None:
    """Let a range of addresses be a range of the file; atomic."""
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, place) != address:
        raise MemoryError(f"registered memory cannot be mapped: {os.strerror(ctypes.get_errno())}")


def _move(start: int, to: int, size: int) -> bool:
    """Move the pages of a range of addresses with mremap(2), and leave the range itself mapped."""
    return int(_libc.mremap(start, size, size, _MAYMOVE_FIXED_DONTUNMAP, to)) == to


_libc.mremap.restype = _libc.mmap.restype = ctypes.c_ssize_t
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)

_shared: "weakref.WeakValueDictionary[int, Arena]" = weakref.WeakValueDictionary()
_lock = threading.Lock()


def process_arena() -> Arena:
    """The arena of this process, while somebody has it or a tensor of it; a forked child has one of its own."""
    with _lock:
        return _shared.get(os.getpid()) or _shared.setdefault(os.getpid(), Arena())


def exchange(one: Tensor, other: Tensor) -> int:
    """`Arena.exchange` in this process' arena, if it has one; returns the number of bytes."""
    arena = _shared.get(os.getpid())
    return 0 if arena is None else arena.exchange(one, other)


class MappedArena:
    """Another member's arena, to read from. The `descriptor` may be closed after."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, CAPACITY, mmap.MAP_SHARED, mmap.PROT_READ)
        data = np.frombuffer(self._memory, dtype=np.uint8)
        self._bytes = torch.utils.dlpack.from_dlpack(data)  # which takes read-only memory without complaint

    def view(self, start: int, like: Tensor) -> Tensor:
        """The owner's data at `start`, as many of the same dtype as `like`, without a copy. Writing would fault."""
        return self._bytes[start : start + like.nbytes].view(like.dtype)
