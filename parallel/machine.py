"""A machine as the planner sees it: what a rank computes, and what its links carry along each axis of a mesh.

Made from what `ringhold bench --calibrate` saved, or from a cluster of `parallel.scale`. Called by `parallel.cost`.
"""

import json
from pathlib import Path
from typing import Self

import msgspec

from collectives.cost import PROFILES, Compute, Profile
from collectives.topology import Link
from parallel.layout import Mesh
from parallel.scale.cluster import Cluster


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of a rank: seconds, bytes, FLOP/s. Ranks of a node are neighbours on the last axes of a mesh."""

    name: str
    flops: float
    """Of matrix products in 32 bits."""
    double_flops: float
    """Of those in 64 bits."""
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
    def load(cls, name: str) -> Self:
        """A cluster that ships, by its name; or a file: of a cluster, or of what `ringhold bench --calibrate` saved.

        Raises:
            UsageError: it is neither, or cannot be read.

        """
        try:
            given = json.loads(Path(name).read_bytes()) if name.endswith(".json") else None
        except (OSError, ValueError):
            given = None  # the cluster's reader says what is wrong
        if isinstance(given, dict) and "reduce_rate" in given:
            return cls.of_profile(Profile.load(name), name)
        return cls.of_cluster(Cluster.load(name))

    @classmethod
    def of_profile(cls, profile: Profile, name: str = "cpu") -> Self:
        """CPU ranks on one host, with what was measured of a transport and of computing.

        Where computing was not measured, a rank is a core of 40 GFLOP/s and 20 GB/s from caches and memory.
        """
        compute = profile.compute or Compute(flops={}, bandwidth=2e10, kernel=4e-6)
        single = compute.flops.get("float32", 4e10)
        near = Link(latency=profile.near.latency + 2 * profile.overhead, bandwidth=profile.near.bandwidth)
        far = Link(latency=profile.far.latency + 2 * profile.overhead, bandwidth=profile.far.bandwidth)
        return cls(
            name=name,
            flops=single,
            half_flops=compute.flops.get("bfloat16", single),
            double_flops=compute.flops.get("float64", single),
            bandwidth=compute.bandwidth,
            kernel=compute.kernel,
            launch=profile.operation,
            near=near,
            far=far,
            node=1 << 20,
        )

    @classmethod
    def of_cluster(cls, cluster: Cluster) -> Self:
        """Devices of a cluster. Products in 32 bits and more are taken to go at half the rate of those in 16."""
        half = cluster.flops * cluster.matmul_efficiency
        return cls(
            name=cluster.name,
            flops=half / 2,
            half_flops=half,
            double_flops=half / 2,
            bandwidth=cluster.bandwidth,
            kernel=cluster.kernel,
            launch=cluster.kernel,
            near=Link(latency=cluster.link_latency, bandwidth=cluster.link),
            far=Link(latency=cluster.network_latency, bandwidth=cluster.network),
            node=cluster.node,
        )

    def rate(self, itemsize: int) -> float:
        """FLOP/s of matrix products of elements of so many bytes."""
        return self.half_flops if itemsize <= 2 else self.flops if itemsize <= 4 else self.double_flops

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
