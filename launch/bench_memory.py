"""The speed of this host's memory, and the least time that an all-reduce within it can take.

Called on all ranks at once, by `launch.bench_rank` and the calibration: ranks share the memory's bandwidth, as they do
in a collective.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes written per second by a copy of memory, and by an addition of two float tensors."""

    copy: float
    add: float


def measure_bandwidth(size: int) -> Bandwidth:
    """Measure with buffers of `size` bytes, the median of some repeats; the copy is numpy's, the addition torch's."""
    count = max(1, size // 4)
    left, right, target = torch.ones(count), torch.ones(count), torch.empty(count)
    flat_from, flat_to = left.numpy(), target.numpy()
    copies, adds = [], []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        np.copyto(flat_to, flat_from)
        copied = time.perf_counter()
        torch.add(left, right, out=target)
        copies.append(copied - begun)
        adds.append(time.perf_counter() - copied)
    return Bandwidth(4 * count / sorted(copies)[_REPEATS // 2], 4 * count / sorted(adds)[_REPEATS // 2])


def reduction_floor(size: int, ranks: int, host: Bandwidth) -> float:
    """Return the seconds that memory alone takes for an all-reduce of `size` bytes among `ranks` processes of one host.

    Each chunk is the sum of `ranks` parts, which takes ranks - 1 additions, and is then copied to the ranks - 1 that do
    not have it; so (ranks - 1) * size bytes are added and as many copied, at the bandwidths of the host (all ranks
    together). Caches can do better: a chunk that is copied while it is still in one costs less.
    """
    moved = (ranks - 1) * size
    return moved / host.add + moved / host.copy
