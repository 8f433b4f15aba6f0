"""A machine as the planner sees it: what a rank computes, and what its links carry along each axis of a mesh.

Made from what `ringhold bench --calibrate` saved, or from a cluster of `parallel.scale`. Called by `parallel.cost`.
"""

from typing import Self

import msgspec

from collectives.cost import PROFILES, Profile
from collectives.topology import Link
from parallel.layout import Mesh
from parallel.scale.cluster import Cluster


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of a rank: seconds, bytes, FLOP/s. Ranks of a node are neighbours on the last axes of a mesh."""

    name: str
    flops: float
    """Of matrix products in 32 bits and more."""
    half_flops: float
    """Of those in 16 bits."""
    bandwidth: float
    """Bytes a second of a rank's memory."""
    kernel: float
    """Seconds that an operation takes at least."""
    launch: float
    """Seconds that a collective takes besides its messages."""
    near: Link
    """Between ranks of one node: seconds of a message, bytes a second of a rank."""
    far: Link
    node: int
    """Ranks of a node."""

    @classmethod
    def of_profile(cls, profile: Profile, name: str = "cpu") -> Self:
        """CPU ranks on one host, with the costs of a transport as they were measured.

        A rank computes as one core does: 40 GFLOP/s, and 20 GB/s from caches and memory.
        """
        near = Link(latency=profile.near.latency + 2 * profile.overhead, bandwidth=profile.near.bandwidth)
        far = Link(latency=profile.far.latency + 2 * profile.overhead, bandwidth=profile.far.bandwidth)
        return cls(
            name=name,
            flops=4e10,
            half_flops=4e10,
            bandwidth=2e10,
            kernel=4e-6,
            launch=profile.operation,
            near=near,
            far=far,
            node=1 << 20,
        )

    @classmethod
    def of_cluster(cls, cluster: Cluster) -> Self:
        """Devices of a cluster."""
        half = cluster.flops * cluster.matmul_efficiency
        return cls(
            name=cluster.name,
            flops=half / 2,
            half_flops=half,
            bandwidth=cluster.bandwidth,
            kernel=cluster.kernel,
            launch=cluster.kernel,
            near=Link(latency=cluster.link_latency, bandwidth=cluster.link),
            far=Link(latency=cluster.network_latency, bandwidth=cluster.network),
            node=cluster.node,
        )

    def link(self, mesh: Mesh, axes: tuple[str, ...]) -> Link:
        """The slower of the links along some axes of a mesh."""
        stride, slow = 1, self.near
        for name, size in reversed(mesh.axes):
            if (name in axes or not axes) and stride * size > self.node:
                slow = self.far
            stride *= size
        return slow


CPU = Machine.of_profile(PROFILES["gloo"])
"""Ranks of one host over gloo, which is what communicators use unless told otherwise."""
