"""Memory that the members of one host can map: registered buffers, which a peer's reduction reads in place.

`Communicator.empty` takes tensors from it; the shared-memory transport tells peers where in it data are. A process has
one sparse file without a name; pages exist once they are touched, and go when the tensor goes.
"""

import mmap
import os
import threading
import weakref
from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CAPACITY = 2**37
"""Bytes of address space, of which only what is used costs memory."""
_PAGE = mmap.PAGESIZE


class Arena:
    """One process' registered memory. For any thread. What was taken from it stays valid when the arena is gone."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ringhold-arena", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, CAPACITY)
        self._memory = mmap.mmap(self.descriptor, CAPACITY)
        self._base = int(np.frombuffer(self._memory, dtype=np.uint8, count=1).ctypes.data)
        self._lock = threading.Lock()
        self._free = [(0, CAPACITY)]
        """(start, stop) of what nobody uses, in order, no two of them adjacent."""

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
        """Where in the arena a contiguous tensor lies; None if it lies elsewhere."""
        at = data.data_ptr() - self._base
        return at if 0 <= at < CAPACITY else None

    def _take(self, size: int) -> int:
        with self._lock:
            for index, (start, stop) in enumerate(self._free):
                if stop - start >= size:
                    self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                    return start
        raise MemoryError(f"no {size} bytes are left of the {CAPACITY} of registered memory")

    def _give_back(self, start: int, stop: int) -> None:
        self._memory.madvise(mmap.MADV_REMOVE, start, stop - start)
        with self._lock:
            index = bisect_left(self._free, (start, stop))
            if index < len(self._free) and self._free[index][0] == stop:
                stop = self._free.pop(index)[1]
            if index > 0 and self._free[index - 1][1] == start:
                start = self._free.pop(index - 1)[0]
            insort(self._free, (start, stop))


_shared: "weakref.WeakValueDictionary[int, Arena]" = weakref.WeakValueDictionary()
_lock = threading.Lock()


def process_arena() -> Arena:
    """The arena of this process, while somebody has it or a tensor of it; a forked child has one of its own."""
    with _lock:
        return _shared.get(os.getpid()) or _shared.setdefault(os.getpid(), Arena())


class MappedArena:
    """Another member's arena, to read from. The `descriptor` may be closed after."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, CAPACITY, mmap.MAP_SHARED, mmap.PROT_READ)
        data = np.frombuffer(self._memory, dtype=np.uint8)
        self._bytes = torch.utils.dlpack.from_dlpack(data)  # which takes read-only memory without complaint

    def view(self, start: int, like: Tensor) -> Tensor:
        """The owner's data at `start`, as many of the same dtype as `like`, without a copy. Writing would fault."""
        return self._bytes[start : start + like.nbytes].view(like.dtype)
