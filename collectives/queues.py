"""Ports as queues: when messages that are sent at once get through what they share; the physics of `simulate`.

All messages of a step are taken at once, as arrays with a row a message. A message is a train of segments. Its head may
go on before its tail is there, port after port (virtual cut-through), and a port serves whole trains in the order in
which their heads come. With unshared ports and one segment this is

    done = max(now, busy) + bytes / bandwidth + latency
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from collectives.region import Ints
from collectives.schedule import Bools
from collectives.topology import NO_PORT, Floats, Topology

Numbers: TypeAlias = npt.NDArray[np.integer[Any]]
"""Ranks, ports or places in an array."""


@dataclass(slots=True)
class Trains:
    """Messages on their way, one a row; times are seconds at the place where they are now.

    `size` is the length of all of a message in bytes and `segment` that of one of its segments.
    """

    size: Floats
    segment: Floats
    head: Floats
    """When the first segment may begin to enter."""
    last: Floats
    """When the last segment may begin to enter."""
    first_tail: Floats
    """Not before this has the first segment wholly entered."""
    tail: Floats
    """Not before this has everything entered."""


@dataclass(frozen=True, slots=True)
class _Hop:
    """One port of each route: which rows have one, which it is, and whether no two rows have the same."""

    rows: Ints | None
    ports: Ints
    distinct: bool


@dataclass(frozen=True, slots=True)
class Paths:
    """The routes of a step's messages."""

    hops: tuple[_Hop, ...]
    distinct_src: bool
    distinct_dst: bool


class Queues:
    """The ports of a topology, and until when each is taken."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._free = np.zeros(len(topology.ports))
        self._latency = topology.latency + topology.jitter / 2  # on average
        self.carried = np.zeros(len(topology.ports))
        """Bytes, by port."""
        self._ends: tuple[Numbers, Numbers] = (np.zeros(0, np.int32), np.zeros(0, np.int32))
        self._paths = Paths((), True, True)

    def paths(self, src: Numbers, dst: Numbers) -> Paths:
        """The routes between these ranks; free where they are those of the step before."""
        if not (np.array_equal(src, self._ends[0]) and np.array_equal(dst, self._ends[1])):
            routes = self._topology.routes(src.astype(np.int64), dst.astype(np.int64))
            hops = []
            for column in routes.T:
                rows = np.flatnonzero(column != NO_PORT)
                if len(rows):
                    ports = column[rows]
                    hops.append(_Hop(None if len(rows) == len(column) else rows, ports, distinct(ports)))
            self._ends, self._paths = (src, dst), Paths(tuple(hops), distinct(src), distinct(dst))
        return self._paths

    def send(self, paths: Paths, trains: Trains) -> Floats:
        """Move the trains to their destinations; returns when each has left its source."""
        left = trains.tail.copy()
        seen = np.zeros(len(left), np.bool_)
        for hop in paths.hops:
            if hop.rows is None:
                end = self._pass(hop, trains)
                left = end if not seen.any() else np.where(seen, left, end)
                seen[:] = True
            else:
                part = Trains(*(getattr(trains, name)[hop.rows] for name in Trains.__slots__))
                end = self._pass(hop, part)
                for name in ("head", "last", "first_tail", "tail"):
                    getattr(trains, name)[hop.rows] = getattr(part, name)
                left[hop.rows] = np.where(seen[hop.rows], left[hop.rows], end)
                seen[hop.rows] = True
        return left

    def _pass(self, hop: _Hop, trains: Trains) -> Floats:
        """Move trains through a port each; when the port is done with them."""
        bandwidth, latency = self._topology.bandwidth[hop.ports], self._latency[hop.ports]
        whole, piece = trains.size / bandwidth, trains.segment / bandwidth
        ready = np.maximum(trains.last + piece, trains.tail)
        start, end = (_side_by_side if hop.distinct else _in_turn)(self._free, hop.ports, trains.head, whole, ready)
        if hop.distinct:
            self.carried[hop.ports] += trains.size
        else:
            self.carried += np.bincount(hop.ports, trains.size, len(self.carried))
        trains.first_tail = np.maximum(start + piece, trains.first_tail) + latency
        trains.head = start + latency
        trains.last = end - piece + latency
        trains.tail = end + latency
        return end


def distinct(numbers: Numbers) -> bool:
    """Whether no two of these (non-negative) are the same."""
    return not len(numbers) or bool(np.bincount(numbers).max() == 1)


def raise_to(target: Floats, where: Numbers, values: Floats, apart: bool) -> None:
    """`target[where] = max(target[where], values)`; `apart`: no place is there twice."""
    if apart:
        target[where] = np.maximum(target[where], values)
    else:
        np.maximum.at(target, where, values)


def _side_by_side(free: Floats, ports: Ints, head: Floats, whole: Floats, ready: Floats) -> tuple[Floats, Floats]:
    """Serve one train a port: when it begins to enter, and when it has; `free` is brought up to date."""
    start = np.maximum(head, free[ports])
    end = np.maximum(start + whole, ready)
    free[ports] = end
    return start, end


def _in_turn(free: Floats, ports: Ints, head: Floats, whole: Floats, ready: Floats) -> tuple[Floats, Floats]:
    """Serve several trains a port in the order of their heads, as `_side_by_side`.

    Behind each other they end at `end[i] = max(lone[i], end[i-1] + whole[i])`, with `lone` as if there were no others.
    Less the running sum of `whole` that is a running maximum; lifting each port above the one before keeps them apart.
    """
    order: Ints = np.lexsort((head, ports))
    port, work = ports[order], whole[order]
    lone = np.maximum(np.maximum(head[order], free[port]) + work, ready[order])
    total = np.cumsum(work)
    group = np.cumsum(np.diff(port, prepend=port[0]) != 0)
    excess = lone - total
    lift = group * (np.ptp(excess) + 1.0)
    ended = np.maximum.accumulate(excess + lift) - lift + total
    before: Bools = np.diff(group, prepend=-1) == 0
    begun = np.maximum(head[order], free[port])
    begun[before] = np.maximum(begun[before], ended[np.flatnonzero(before) - 1])
    np.maximum.at(free, port, ended)
    start, end = np.empty_like(begun), np.empty_like(ended)
    start[order], end[order] = begun, ended
    return start, end
