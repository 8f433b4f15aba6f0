"""How long a schedule takes on a topology, without running it: thousands of ranks in seconds.

Called by `ringhold simulate` and by whoever compares algorithms. A rank does its part as the engine does: transfers are
cut into segments; what is received is dealt with in the order of steps, reduced, and sent on segment by segment; a
send waits for the writes of its range in earlier steps; what a rank has from the start is sent at the start.

All ranks' transfers of a step are computed at once, so 4096 ranks take as many array operations as four. What is
approximate for the sake of that:

- A port serves the messages of a step before those of the next, and within a step whole messages in the order of their
  heads, where a real one interleaves packets. This shifts who waits for whom on shared ports; it keeps their load.
- A message's segments arrive evenly between its first and its last; gaps between them are not followed further.
- A message passes several ports by virtual cut-through, with unlimited memory in the switches.
- The memory of a send is free at once (a transport buffers). Jitter counts with its mean. Compute kernels and copies
  inside a rank take `reduce_rate` as reductions do, and nothing by default. Headers and confirmations are left out.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from collectives.errors import UsageError
from collectives.queues import Paths, Queues, Trains, distinct, raise_to
from collectives.readiness import Readiness, segments, survey
from collectives.schedule import Computes, Schedule, Step
from collectives.topology import Floats, Topology

SEGMENT_BYTES = 2**19
"""As the engine cuts what it sends over sockets (`engine.NOTE_BYTES`)."""


def bus_factor(kind: str, world: int) -> float:
    """busbw / algbw of a kind as nccl-tests define it (doc/PERFORMANCE.md); 1 for kinds that they do not know."""
    share = (world - 1) / world
    return {"all_reduce": 2 * share, "reduce_scatter": share, "all_gather": share, "all_to_all": share}.get(kind, 1.0)


@dataclass(frozen=True, slots=True)
class Timing:
    """What `simulate` found. Times are in seconds, sizes in bytes, rates in bytes a second; arrays are by rank or port.

    Attributes:
        time: until the last rank is done.
        nbytes: of the buffer that the collective is about: the largest that a rank gives or gets.
        finish: when each rank has received and reduced everything, and its last byte has left.
        port_bytes: what each port carried.
        port_busy: for how long it did.

    """

    kind: str
    world: int
    time: float
    nbytes: int
    finish: Floats
    port_bytes: Floats
    port_busy: Floats
    ports: tuple[str, ...]

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
) -> Timing:
    """Time a schedule; rank `r` of the schedule is rank `r` of the topology, which may have more.

    Args:
        schedule: what is done.
        topology: where.
        segment_bytes: transfers are cut into segments of about this many bytes.
        itemsize: bytes of an element.
        reduce_rate: bytes a second that a rank reduces, one segment after the other.

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
    run = _Run(schedule, topology, segment_bytes, itemsize, reduce_rate)
    for index in range(len(schedule)):
        run.step(schedule.step(index))
    finish = np.maximum(run.clock, run.sent)
    nbytes = itemsize * max(
        sum(stop - start for start, stop in side(rank))
        for side in (schedule.held, schedule.wanted)
        for rank in range(schedule.world)
    )
    carried = run.queues.carried
    busy = carried / topology.bandwidth
    return Timing(schedule.kind, schedule.world, float(finish.max()), nbytes, finish, carried, busy, topology.ports)


class _Run:
    """The state between two steps.

    `clock` says when each rank has dealt with all that it received, `sent` when its last byte has left it.
    """

    def __init__(
        self, schedule: Schedule, topology: Topology, segment_bytes: int, itemsize: int, reduce_rate: float
    ) -> None:
        found = survey(schedule)
        self._segment = segment_bytes / itemsize
        self._itemsize = itemsize
        self._reduce_rate = reduce_rate
        single = float(segments(np.array([found.longest]), self._segment)[0]) == 1
        self._ready = Readiness(schedule.world, found.bounds, self._segment, single)
        self.queues = Queues(topology)
        self.clock = np.zeros(schedule.world)
        self.sent = np.zeros(schedule.world)

    def step(self, step: Step) -> None:
        """Let everything of a step happen."""
        if len(step.src):
            self._transfer(step)
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
