"""How one message crosses a network of ports: the rule that emulation and the exact simulation share.

A port keeps the times for which it is taken as disjoint intervals in order, and a message takes what is free from the
instant at which its head is there, in pieces if need be: packets of messages that were sent later go through where
there is room. Port after port, the head goes on at once (virtual cut-through); switches hold what has to wait. Alone
on a port that is

    done = max(now, busy) + latency + bytes / bandwidth

with the port busy for bytes / bandwidth: latency is time in flight.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import TypeAlias

from collectives.topology import Topology

Intervals: TypeAlias = list[tuple[float, float]]
Route: TypeAlias = tuple[tuple[int, float, float], ...]
"""Of each port: its number, latency in seconds and bandwidth in bytes a second."""
Take: TypeAlias = Callable[[int, float, float], tuple[float, float]]
"""(port, head, seconds): take the port for so long, not before `head`; returns from when on, and until when."""

_TOUCH = 1e-12


def route_of(topology: Topology, src: int, dst: int) -> Route:
    """The route from one rank to another."""
    links = ((port, topology.link(port)) for port in topology.route(src, dst))
    return tuple((port, link.latency, link.bandwidth) for port, link in links)


def jitter_of(topology: Topology, src: int, dst: int) -> float:
    """How much later than the route's latency a message may come, at most; in seconds."""
    return sum(topology.link(port).jitter for port in topology.route(src, dst))


def cross(route: Route, nbytes: int, head: float, take: Take) -> tuple[float, float]:
    """Send a message that may enter at `head`; when its last byte has left the source, and when it has arrived."""
    left, tail = head, head
    for place, (port, latency, bandwidth) in enumerate(route):
        start, stop = take(port, head, nbytes / bandwidth)
        if place == 0:
            left = stop
        head, tail = start + latency, max(stop, tail) + latency
    return left, tail


def reserve(taken: Intervals, head: float, seconds: float) -> tuple[float, float]:
    """Take the first so many seconds that are free from `head` on, in place; returns when they begin and end."""
    first = bisect_right(taken, head, key=lambda interval: interval[1])
    start, now, place, rest = head, head, first, seconds
    while place < len(taken):
        begin, end = taken[place]
        if begin > now:
            if rest <= begin - now:
                break
            rest -= begin - now
        elif now == start:
            start = end
        now = max(now, end)
        place += 1
    stop = now + rest
    if seconds:  # all that was free between is taken now: what it touches is one interval
        low = first - 1 if first and taken[first - 1][1] >= start - _TOUCH else first
        while low < place and taken[low][1] < start - _TOUCH:
            low += 1
        high = place + 1 if place < len(taken) and taken[place][0] <= stop + _TOUCH else place
        joined = taken[low:high]
        taken[low:high] = [(min([start, *(begin for begin, _ in joined)]), max([stop, *(end for _, end in joined)]))]
    return start, stop


def forget(taken: Intervals, before: float) -> None:
    """Drop what ended by then."""
    del taken[: bisect_left(taken, before, key=lambda interval: interval[1])]
