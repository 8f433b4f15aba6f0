"""A cluster by its numbers: what one device computes and holds, and what the links within and between nodes carry.

`hardware/*.json` holds some, each number with its source. Communication is Hockney's alpha-beta model by group: a ring
whose ranks sit in nodes goes at the rate of its slowest link, and of the network cards of a node each group has those
of its own ranks.
"""

from dataclasses import dataclass
from typing import Self

import msgspec

from collectives.errors import UsageError
from parallel.scale import files


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Numbers of a cluster: seconds, bytes, FLOP/s.

    Raises:
        UsageError: a number that must be positive is not.

    """

    name: str
    memory: float
    """Bytes of a device."""
    reserved: float
    """Bytes of it that a process loses to the driver, libraries and communication."""
    flops: float
    """Peak of 16-bit matrix products."""
    fp8_flops: float
    matmul_efficiency: float
    """What the largest matrix products reach of the peak; calibrated (docs/prediction.md)."""
    fp8_efficiency: float
    attention_efficiency: float
    """What fused causal attention reaches of the 16-bit peak on long sequences, forward; backward is 0.8 of it."""
    multiprocessors: int
    bandwidth: float
    """Bytes a second of memory, as kernels reach it."""
    kernel: float
    """Seconds that a kernel takes at least."""
    node: int
    """Devices of a node."""
    link: float
    """Bytes a second of a device within its node, one way, as collectives reach it."""
    network: float
    """Bytes a second of a device to other nodes, one way, as collectives reach it."""
    link_latency: float
    network_latency: float
    tp_overlap: float
    """Share of tensor-parallel communication that hides behind matrix products."""
    dp_overlap: float
    """Share of the neighbouring passes behind which data-parallel communication hides."""
    pp_overlap: float
    """Share of the messages between stages that hides behind passes."""
    gradient_bytes: int
    """Bytes of a gradient in memory and on the wire, unless a strategy says otherwise."""
    flash: bool
    """Whether the software of its time fuses attention."""
    sources: dict[str, str] = {}

    def __post_init__(self) -> None:
        for field in ("memory", "flops", "fp8_flops", "bandwidth", "node", "link", "network", "matmul_efficiency"):
            if not getattr(self, field) > 0:
                raise UsageError(f"{field} must be positive, not {getattr(self, field)!r}")

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a cluster that ships by its name, or one of the user's by its path. UsageError: it cannot be read."""
        return files.read("hardware", name, cls)

    def group(self, size: int, stride: int) -> "Group":
        """The link of a group of ranks, `stride` apart in the numbering."""
        inside = min(size, max(1, self.node // stride))
        if inside == size:
            return Group(size, inside, self.link, self.link, self.link_latency)
        rate = min(self.link, self.network * inside)
        return Group(size, inside, rate, min(self.link, self.network), self.network_latency)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate.

    Attributes:
        size: how many there are.
        inside: how many of them share a node.
        rate: bytes a second around a ring of them.
        own: bytes a second that each rank gets out of its node, or, if they share one, to the others.
        latency: seconds a step.

    """

    size: int
    inside: int
    rate: float
    own: float
    latency: float

    def gather(self, nbytes: float) -> float:
        """Seconds of an all-gather to, or a reduce-scatter of, so many bytes on each rank."""
        if self.size == 1:
            return 0.0
        # NCCL's trees and hierarchies keep the number of steps far below a ring's on large groups.
        steps = min(self.size - 1, 16)
        return steps * self.latency + (self.size - 1) / self.size * nbytes / self.rate

    def reduce(self, nbytes: float) -> float:
        """Seconds of an all-reduce of so many bytes."""
        return 2 * self.gather(nbytes)

    def exchange(self, nbytes: float) -> float:
        """Seconds of an all-to-all in which each rank gives so many bytes: what leaves the node takes its own card."""
        if self.size == 1:
            return 0.0
        away = self.size - (self.inside if self.inside < self.size else 1)
        return min(self.size - 1, 16) * self.latency + away / self.size * nbytes / self.own

    def send(self, nbytes: float) -> float:
        """Seconds of a message to a neighbour."""
        return 0.0 if self.size == 1 else self.latency + nbytes / self.rate
