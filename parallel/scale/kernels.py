"""How long one device takes for a kernel: matrix products by their shape, fused attention, and what memory limits."""

import math
from dataclasses import dataclass

from parallel.scale.cluster import Cluster
from parallel.scale.strategy import Precision

_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (64, 128, 0.8), (64, 64, 0.65))
"""Rows and columns that one multiprocessor computes at a time, and what that tile reaches of the largest one's rate."""
_FILL = 192
"""Steps of the inner dimension's worth of time for filling and draining a tile's pipeline."""
_DIAGONAL = 512
"""Keys' worth of time that causal attention loses to half-masked blocks and short rows, for each row of queries."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Seconds of kernels on a device of a cluster, its matrix products in a precision."""

    cluster: Cluster
    precision: Precision = "bf16"

    def memory(self, nbytes: float) -> float:
        """A kernel that reads and writes so many bytes and does little else."""
        return self.cluster.kernel + nbytes / self.cluster.bandwidth if nbytes else 0.0

    def product(self, m: float, n: float, k: float, count: float = 1) -> float:
        """`count` products of (m, k) and (k, n), in one launch.

        The rate falls where tiles do not fill the multiprocessors (wave quantization) and where the inner dimension is
        short; a product is never faster than its operands can be read and its result written.
        """
        cluster = self.cluster
        fp8 = self.precision == "fp8"
        peak, efficiency = (
            (cluster.fp8_flops, cluster.fp8_efficiency) if fp8 else (cluster.flops, cluster.matmul_efficiency)
        )
        best = max(
            rate * _filled(m, n, count, rows, columns, cluster.multiprocessors) for rows, columns, rate in _TILES
        )
        seconds = 2.0 * m * n * k * count / (peak * efficiency * best * k / (k + _FILL))
        operand = 1 if fp8 else 2
        moved = count * (operand * (m * k + k * n) + 2 * m * n)
        casts = 2 * count * (m * k + k * n) if fp8 else 0  # written once more in 8 bits, with its transpose
        return max(seconds, moved / cluster.bandwidth) + cluster.kernel + casts / cluster.bandwidth

    def attention(self, flops: float, keys: float, backward: bool = False) -> float:
        """Fused causal attention to `keys` keys whose full scores would take so many FLOPs: half are computed."""
        rate = self.cluster.flops * self.cluster.attention_efficiency * (0.8 if backward else 1.0)
        return self.cluster.kernel + 0.5 * flops * (1.0 + _DIAGONAL / keys) / rate


def _filled(m: float, n: float, count: float, rows: int, columns: int, processors: int) -> float:
    """Share of the work of all tiles of all waves that is wanted work."""
    tiles = count * math.ceil(m / rows) * math.ceil(n / columns)
    wanted = count * m * n / (rows * columns)
    return wanted / (math.ceil(tiles / processors) * processors)
