"""Big work buffers that are used again; taken by the communicator for results and by the engine for scratch memory.

Fresh pages cost a fault each, more than the copy that fills them, so memory goes back to the pool and not to the
system. Nobody gives it back by hand: a buffer is free once nothing refers to its storage any more, be it a view, an
operation in flight, or a result that was handed to the caller. So memory that an abandoned attempt may still write to
is out of reach for exactly as long as the transport keeps it.
"""

import mmap
import sys
import threading
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SMALL = 256 * 1024
"""Smaller buffers come from the ordinary allocator, which reuses its memory well enough (bytes)."""
PATIENCE = 256
"""A buffer that was not taken while others were, so many times, goes back to the system."""
_HUGE = 2 * 1024 * 1024

Bytes: TypeAlias = npt.NDArray[np.uint8]


def anonymous(capacity: int) -> Bytes:
    """Fresh memory of this process alone, aligned to huge pages where it is large enough for them."""
    if capacity < _HUGE:
        return np.frombuffer(mmap.mmap(-1, capacity), dtype=np.uint8)
    memory = mmap.mmap(-1, capacity + _HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -int(whole.ctypes.data) % _HUGE
    return np.frombuffer(memory, dtype=np.uint8, count=capacity, offset=start)


class _Block:
    """A piece of memory, and whether somebody uses it."""

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory
        self.capacity = len(memory)
        self.last_use = 0

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor whose storage keeps a reference to the memory until the last view of it is gone."""
        return torch.from_numpy(self.memory[: count * dtype.itemsize]).view(dtype)

    def references(self) -> int:
        """How often the memory is referred to; compare with a block whose memory nobody uses."""
        return sys.getrefcount(self.memory)


_FREE = _Block(np.zeros(1, dtype=np.uint8)).references()


class StagingPool:
    """Hands out flat uninitialized tensors and uses their memory again. For any thread.

    When it hands out a buffer, it drops free ones, the longest unused first, until all that is free makes up no more
    than twice the largest; and those that were not used for the last PATIENCE times. A tensor of the pool is ordinary
    but for one thing: its storage cannot be resized.

    Args:
        allocate: makes so many bytes of uninitialized memory, which goes back when nothing refers to it. No view of
            another array: numpy lets views of a view refer to that one, and they would not be counted.

    """

    def __init__(self, allocate: Callable[[int], Bytes] = anonymous) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []
        self._clock = 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor of shape (count,), aligned to 64 bytes at least."""
        size = count * dtype.itemsize
        if size < SMALL:
            return torch.empty(count, dtype=dtype)
        with self._lock:
            self._clock += 1
            capacity = _rounded(size)
            fits = [b for b in self._blocks if size <= b.capacity <= 2 * capacity and b.references() == _FREE]
            if fits:
                block = min(fits, key=lambda b: (b.capacity, -b.last_use)) if len(fits) > 1 else fits[0]
            else:
                block = _Block(self._allocate(capacity))
                self._blocks.append(block)
            block.last_use = self._clock
            tensor = block.tensor(count, dtype)
            if len(self._blocks) > 1:
                self._trim(block)
            return tensor

    def close(self) -> None:
        """Let go of everything; what is in use stays valid for whoever has it."""
        with self._lock:
            self._blocks.clear()
            self._allocate = anonymous

    def idle_bytes(self) -> int:
        """Bytes that the pool keeps and nobody uses."""
        with self._lock:
            return sum(block.capacity for block in self._blocks if block.references() == _FREE)

    def _trim(self, taken: _Block) -> None:
        """Drop free blocks; the one that was just taken counts as one that will be free. Called under the lock."""
        free = sorted((b for b in self._blocks if b.references() == _FREE), key=lambda b: b.last_use)
        excess = sum(b.capacity for b in free) + taken.capacity - 2 * max(b.capacity for b in self._blocks)
        for block in free:
            if excess > 0 or self._clock - block.last_use > PATIENCE:
                excess -= block.capacity
                self._blocks.remove(block)


def copy_out(staging: Tensor, target: Tensor) -> None:
    """Copy flat `staging` into `target`: as many elements in row-major order, of any strides, of this or another dtype.

    A plain memory copy runs a third faster than torch's copy kernel on tensors that do not fit in the caches, and twice
    as fast where the C library chooses streaming stores for that size. Beneath that it is not worth the preparation.
    """
    large = staging.nbytes >= SMALL and target.dtype == staging.dtype
    if not large or not target.is_contiguous() or target.is_conj() or target.is_neg():
        target.detach().copy_(staging.view(target.shape))
        return
    flat = target.detach().as_strided((target.numel(),), (1,))
    np.copyto(flat.view(torch.uint8).numpy(), staging.view(torch.uint8).numpy())
    torch.autograd.graph.increment_version(target)


def _rounded(size: int) -> int:
    """Round up to one of eight steps an octave, so that sizes that differ a little share memory."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
