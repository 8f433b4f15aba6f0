"""What a collective costs: an estimate from a schedule and a few numbers about the transport.

`collectives.choice` compares algorithms with it, so it must be cheap and give the same on all members. It is the model
of Hockney, with a rank's own work for each message as in LogP (Culler et al., PPoPP 1993). A step takes the latency of
its slowest link and what its busiest rank has to do: its overhead for each message sent and received, its bytes out or
in, whichever take longer, and what it reduces. Links that leave a host are shared by the ranks of that host.

Steps one behind the other give the time of an engine that ends each step before it begins the next. Ours passes on each
segment as it arrives, sending while it receives, so the time is also no more than what the busiest rank has to do in
all, plus the time that the first segment takes through all steps. The lesser of the two is the estimate.
`collectives.simulate` follows a schedule through a network in detail instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from collectives.engine import NOTE_BYTES
from collectives.errors import UsageError
from collectives.region import Ints
from collectives.schedule import Computes, Schedule, Step
from collectives.topology import Floats, Link


class Compute(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a rank computes while all ranks do. Collectives do not go by it; planners do.

    Raises:
        UsageError: a number is not positive.

    """

    flops: dict[str, float]
    """FLOP/s of matrix products, by torch's name of the dtype."""
    bandwidth: float
    """Bytes a second that operations read and write."""
    kernel: float
    """Seconds that any operation takes."""

    def __post_init__(self) -> None:
        numbers = {"bandwidth": self.bandwidth, "kernel": self.kernel} | self.flops
        for name, number in numbers.items():
            if not 0 < number < float("inf"):
                raise UsageError(f"{name} of what a rank computes must be positive, not {number!r}")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a transport is like where it runs. The same on all members, or they choose different algorithms.

    Raises:
        UsageError: a number of seconds is negative, or a rate is not positive.

    """

    near: Link
    """Between ranks of one host."""
    far: Link
    """Between hosts; all ranks of a host share it."""
    overhead: float
    """Seconds of a rank's time for each message that it sends or receives."""
    reduce_rate: float
    """Bytes a second that a rank reduces."""
    operation: float = 0.0
    """Seconds that any operation takes: header, confirmation."""
    favours: tuple[str, ...] = ()
    """Algorithms that win where others are about as good."""
    compute: Compute | None = None
    """What a rank computes, if it was measured."""

    def __post_init__(self) -> None:
        for name in ("overhead", "operation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be a number of seconds, 0 or more, not {getattr(self, name)!r}")
        if not 0 < self.reduce_rate < float("inf"):
            raise UsageError(f"reduce_rate must be a positive number of bytes a second, not {self.reduce_rate!r}")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile from a JSON file.

        Raises:
            UsageError: the file cannot be read, is not JSON, or has a field too many, too few, or of the wrong kind.

        """
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except OSError as error:
            raise UsageError(f"cannot read the profile {path}: {error.strerror}; name a file of costs") from error
        except (msgspec.DecodeError, UsageError) as error:
            raise UsageError(f"{path} is no profile of costs: {error}; compare it with one that was saved") from error

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, whole or not at all.

        Raises:
            UsageError: the file cannot be written.

        """
        draft = Path(f"{path}.draft")
        try:
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
            draft.replace(path)
        except OSError as error:
            raise UsageError(f"cannot write the profile {path}: {error.strerror}") from error


_NETWORK = Link(latency=50e-6, bandwidth=1.25e9)
"""Between hosts, unless measured: TCP over 10 Gbit/s Ethernet."""

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "gloo": Profile(
            near=Link(latency=8e-6, bandwidth=3e9), far=_NETWORK, overhead=15e-6, reduce_rate=6e9, operation=60e-6
        ),
        "sockets": Profile(
            near=Link(latency=8e-6, bandwidth=3e9), far=_NETWORK, overhead=15e-6, reduce_rate=6e9, operation=60e-6
        ),
        "shm": Profile(
            near=Link(latency=5e-6, bandwidth=8e9),
            far=_NETWORK,
            overhead=6e-6,
            reduce_rate=8e9,
            operation=40e-6,
            favours=("direct",),
        ),
        "mpi": Profile(
            near=Link(latency=3e-6, bandwidth=4e9), far=_NETWORK, overhead=12e-6, reduce_rate=6e9, operation=50e-6
        ),
    }
)
"""By transport. Found on two cores with 2 and 4 ranks, all algorithms of all_reduce from 4 KiB to 8 MiB in turns:
overhead and latency from how time grows with the messages and steps of 4 KiB, rates from how it grows with size, the
rest of a 4 KiB operation is `operation`. Only ratios count for a choice. An shm rank reads its peers' memory itself,
so what it reads from all at once it need not pass on."""


_STEPS = 128
"""So many steps of a schedule are looked at."""


def profile_of(transport: str) -> Profile:
    """The profile of a transport of this name; that of "sockets" for one that is not known."""
    return PROFILES.get(transport, PROFILES["sockets"])


def estimate(schedule: Schedule, profile: Profile, itemsize: int = 1, hosts: Sequence[int] | None = None) -> float:
    """Seconds that a schedule takes, about; the same to the bit on any machine, as all is added up in a fixed order.

    Args:
        schedule: of any kind. Of more than 128 steps some are taken for all; those of long schedules are alike.
        profile: of the transport.
        itemsize: bytes of an element.
        hosts: the number of each rank's host; None: all on one.

    Raises:
        UsageError: there is not one host a rank.

    """
    if hosts is not None and len(hosts) != schedule.world:
        raise UsageError(f"hosts must be one number a rank; there are {len(hosts)} for a world of {schedule.world}")
    account = _Account(profile, itemsize, np.unique(hosts or [0] * schedule.world, return_inverse=True)[1])
    looked_at = range(0, len(schedule), -(-len(schedule) // _STEPS) or 1)
    for index in looked_at:
        account.add(schedule.step(index), len(schedule) / len(looked_at))
    return profile.operation + account.seconds


class _Account:
    """What the steps of a schedule take."""

    def __init__(self, profile: Profile, itemsize: int, host: Ints) -> None:
        self._profile = profile
        self._itemsize = itemsize
        self._host = host
        self._world, self._hosts = len(host), int(host.max()) + 1
        self._moved: Floats = np.zeros((2, self._world))
        self._worked: Floats = np.zeros(self._world)
        self._crossed: Floats = np.zeros((2, self._hosts))
        self._in_turn = 0.0
        self._first_segment = 0.0

    @property
    def seconds(self) -> float:
        """Until all is done."""
        busiest = max(float((self._moved.max(axis=0) + self._worked).max()), float(self._crossed.max()))
        return min(self._in_turn, busiest + self._first_segment)

    def add(self, step: Step, times: float) -> None:
        """Account for a step, so many times.

        What one rank sends another in a step counts as one message for each segment of it.
        """
        profile = self._profile
        size = self._bytes(step)
        pairs, row = np.unique(step.src.astype(np.int64) * self._world + step.dst, return_inverse=True)
        load = _sums(row, size, len(pairs))
        src, dst = np.divmod(pairs, self._world)
        far = self._host[src] != self._host[dst]
        rate = np.where(far, profile.far.bandwidth, profile.near.bandwidth)
        messages = np.maximum(np.ceil(load / NOTE_BYTES), 1.0)
        moved = _out_and_in(src, dst, load / rate, self._world)
        work = profile.overhead * _sums(np.concatenate([src, dst]), np.tile(messages, 2), self._world)
        reduced = np.where(step.combine, size, 0.0)
        work += _sums(step.dst, reduced, self._world) / profile.reduce_rate
        work += _sums(step.computes.rank, self._bytes(step.computes), self._world) / profile.reduce_rate
        crossing = np.where(far, load / profile.far.bandwidth, 0.0)
        crossed = _out_and_in(self._host[src], self._host[dst], crossing, self._hosts)
        latency = np.where(far, profile.far.latency, profile.near.latency).max(initial=0.0)
        passing = (np.minimum(load, NOTE_BYTES) / rate + 2 * profile.overhead).max(initial=0.0)
        self._in_turn += times * float(latency + max((moved.max(axis=0) + work).max(), crossed.max()))
        self._first_segment += times * float(latency + passing)
        self._moved += times * moved
        self._worked += times * work
        self._crossed += times * crossed

    def _bytes(self, rows: Step | Computes) -> Floats:
        return ((rows.stop - rows.start) * self._itemsize).astype(np.float64)


def _out_and_in(src: Ints, dst: Ints, took: Floats, size: int) -> Floats:
    """What each rank or host sends, and what it receives; shape (2, size)."""
    return np.stack([_sums(src, took, size), _sums(dst, took, size)])


def _sums(index: npt.NDArray[Any], values: Floats, size: int) -> Floats:
    return np.bincount(index, values, size).astype(np.float64)
