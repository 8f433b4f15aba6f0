"""How long a schedule takes on a topology, without running it: thousands of ranks in seconds.

Called by `ringhold simulate` and by whoever compares algorithms. A rank does its part as the engine does: transfers are
cut into segments; what is received is dealt with in the order of steps, reduced, and sent on segment by segment; a
send waits for the writes of its range in earlier steps; what a rank has from the start is sent at the start. Ports are
passed by virtual cut-through, with unlimited memory in the switches. Jitter counts with its mean. Headers,
confirmations and copies inside a rank are left out.

There are two ways. Up to EXACT messages, `replay` runs the engine's own compiled programs and lets every message take
its time on every port by the rule of the emulated transport (`crossing`). Beyond, all ranks' transfers of a step are
computed at once (`queues`, `readiness`), so that 4096 ranks take as many array operations as four. That is exact where
ranks keep in step and share no ports, as in a ring; else approximate:

- A port serves the messages of a step before those of the next, and within a step whole messages in the order of their
  heads, where the engine interleaves segments. The load of a port is right, the order in which it is served is not.
- A message's segments arrive evenly between its first and its last; gaps between them are not followed further.
- The memory of a send is free at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from collectives.busbw import bus_factor
from collectives.engine import NOTE_BYTES, PACK_BYTES
from collectives.errors import UsageError
from collectives.queues import Paths, Queues, Trains, distinct, raise_to
from collectives.readiness import Readiness, Survey, segments, survey
from collectives.replay import Replay
from collectives.schedule import Computes, Schedule, Step
from collectives.topology import Floats, Topology

SEGMENT_BYTES = NOTE_BYTES
"""As the engine cuts what it sends over sockets."""
EXACT = 20_000
"""Messages that are followed one by one; it takes about a tenth of a millisecond each."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What `simulate` found. Times are in seconds, sizes in bytes, rates in bytes a second; arrays are by rank or port.

    Attributes:
        time: until the last rank is done.
        nbytes: of the buffer that the collective is about: the largest that a rank gives or gets.
        finish: when each rank has received and reduced everything, and its last byte has left.
        port_bytes: what each port carried.
        port_busy: for how long it did.
        exact: whether every message was followed.

    """

    kind: str
    world: int
    time: float
    nbytes: int
    finish: Floats
    port_bytes: Floats
    port_busy: Floats
    ports: tuple[str, ...]
    exact: bool

    @property
    def algbw(self) -> float:
        """`nbytes` over `time`; 0 if nothing moves."""
        return self.nbytes / self.time if self.time else 0.0

    @property
    def busbw(self) -> float:
        """`algbw` times `bus_factor`: to be compared with the rate of a link."""
        return self.algbw * bus_factor(self.kind, self.world)

    @property
    def busiest(self) -> int | None:
        """Number of the port that was busy longest, the first of several; None if nothing moved."""
        return int(self.port_busy.argmax()) if self.port_busy.any() else None

    @property
    def bottleneck(self) -> str:
        """Name of the busiest port, or "none"."""
        return "none" if self.busiest is None else self.ports[self.busiest]


def simulate(
    schedule: Schedule,
    topology: Topology,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    itemsize: int = 4,
    reduce_rate: float = inf,
    kernel_seconds: Callable[[str], float] | None = None,
    exact: bool | None = None,
) -> Timing:
    """Time a schedule; rank `r` of the schedule is rank `r` of the topology, which may have more.

    Args:
        schedule: what is done.
        topology: where.
        segment_bytes: transfers are cut into segments of about this many bytes, as the engine does over sockets.
        itemsize: bytes of an element.
        reduce_rate: bytes a second that a rank reduces, and runs the schedule's kernels on, one segment at a time.
        kernel_seconds: how long the kernel of a name takes instead; followed message by message only.
        exact: follow every message, or all of a step at once; None: what the number of messages allows.

    Raises:
        UsageError: the topology has fewer ranks than the schedule, an argument is not positive, or the schedule is too
            intricate to be simulated at that size.

    """
    if schedule.world > topology.ranks:
        raise UsageError(
            f"topology {topology.name!r} has {topology.ranks} ranks, and {schedule.kind} runs on {schedule.world}; "
            f"describe a larger network or simulate fewer ranks"
        )
    if segment_bytes < 1 or itemsize < 1 or not reduce_rate > 0:
        raise UsageError("segment_bytes, itemsize and reduce_rate must be positive")
    segment = max(1, segment_bytes // itemsize)
    if exact is None:
        exact = kernel_seconds is not None or _few(schedule, segment)
    if not exact and kernel_seconds is not None:
        raise UsageError("kernel_seconds needs exact=True; take longer segments if there are too many messages")
    if exact:
        pack = min(PACK_BYTES, segment_bytes) // itemsize
        replay = Replay(schedule, topology, segment, pack, itemsize, reduce_rate, kernel_seconds)
        finish, carried = replay.run(), replay.carried
    else:
        steps = _Steps(schedule, topology, survey(schedule), segment, itemsize, reduce_rate)
        for index in range(len(schedule)):
            steps.take(schedule.step(index))
        finish, carried = np.maximum(steps.clock, steps.sent), steps.queues.carried
    nbytes = itemsize * max(
        sum(stop - start for start, stop in side(rank))
        for side in (schedule.held, schedule.wanted)
        for rank in range(schedule.world)
    )
    busy = carried / topology.bandwidth
    return Timing(
        schedule.kind, schedule.world, float(finish.max()), nbytes, finish, carried, busy, topology.ports, exact
    )


def _few(schedule: Schedule, segment: int) -> bool:
    """Whether a schedule has up to EXACT messages."""
    messages = 0.0
    for index in range(len(schedule)):
        step = schedule.step(index)
        messages += float(segments(step.stop - step.start, segment).sum())
        if messages > EXACT:
            return False
    return True


class _Steps:
    """The state between two steps.

    `clock` says when each rank has dealt with all that it received, `sent` when its last byte has left it.
    """

    def __init__(
        self,
        schedule: Schedule,
        topology: Topology,
        found: Survey,
        segment: int,
        itemsize: int,
        reduce_rate: float,
    ) -> None:
        self._segment = segment
        self._itemsize = itemsize
        self._reduce_rate = reduce_rate
        single = float(segments(np.array([found.longest]), self._segment)[0]) == 1
        self._ready = Readiness(schedule.world, found.bounds, self._segment, single)
        self.queues = Queues(topology)
        self.clock = np.zeros(schedule.world)
        self.sent = np.zeros(schedule.world)

    def take(self, step: Step) -> None:
        """Let everything of a step happen."""
        if len(step.src):
            self._transfer(step)
        if step.computes.operands:
            raise UsageError("computations that read other ranges are followed with exact=True only")
        if len(step.computes.rank):
            self._compute(step.computes)

    def _transfer(self, step: Step) -> None:
        length = step.stop - step.start
        full = np.flatnonzero(length)
        place = self._ready.place(step.start, step.stop) if len(full) == len(length) else None
        if place is not None:
            first, last = self._ready.of(step.src, place)
        else:  # a notification goes when its source has done all else
            first, last = self.clock[step.src], self.clock[step.src]
            place = self._ready.place(step.start[full], step.stop[full])
            first[full], last[full] = self._ready.of(step.src[full], place)
        pieces = segments(length, self._segment)
        size: Floats = length * np.float64(self._itemsize)
        trains = Trains(size, size / pieces, first, last, first, last)
        paths = self.queues.paths(step.src, step.dst)
        raise_to(self.sent, step.src, self.queues.send(paths, trains), paths.distinct_src)
        first, last = self._deal(step, trains, paths)
        raise_to(self.clock, step.dst, last, paths.distinct_dst)
        if len(full) == len(length):
            self._ready.put(step.dst, place, first, last, paths.distinct_dst)
        else:
            self._ready.put(step.dst[full], place, first[full], last[full], paths.distinct_dst)

    def _deal(self, step: Step, trains: Trains, paths: Paths) -> tuple[Floats, Floats]:
        """When the first and the last segment of each transfer has been dealt with at its destination."""
        begin = self.clock[step.dst]
        first, last = np.maximum(trains.first_tail, begin), np.maximum(trains.tail, begin)
        if self._reduce_rate == inf or not step.combine.any():
            return first, last
        piece = np.where(step.combine, trains.segment / self._reduce_rate, 0.0)
        work = np.where(step.combine, trains.size / self._reduce_rate, 0.0)
        if not paths.distinct_dst:  # one processor reduces what comes from all peers
            earliest = np.full(len(self.clock), inf)
            np.minimum.at(earliest, step.dst, first)
            together = np.bincount(step.dst, work, len(self.clock))
            return first + piece, np.maximum(last + piece, (earliest + together)[step.dst])
        return first + piece, np.maximum(last + piece, first + work)

    def _compute(self, computes: Computes) -> None:
        place = self._ready.place(computes.start, computes.stop)
        first, last = self._ready.of(computes.rank, place)
        length = computes.stop - computes.start
        took = length * (self._itemsize / self._reduce_rate)
        pieces = np.where(computes.elementwise, segments(length, self._segment), 1.0)
        first = np.where(computes.elementwise, first, last) + took / pieces
        last = np.maximum(last + took / pieces, first + took * (1 - 1 / pieces))
        apart = distinct(computes.rank)
        raise_to(self.clock, computes.rank, last, apart)
        self._ready.put(computes.rank, place, first, last, apart)
