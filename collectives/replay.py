"""The exact simulation: every rank's compiled program, instruction by instruction, message by message.

Called by `simulate` for what is small enough. The rank whose clock is furthest behind goes on, so messages enter the
network in the order of time; what they meet there is `crossing`, the rule of the emulated transport.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from collectives.crossing import Intervals, Route, cross, forget, jitter_of, reserve, route_of
from collectives.cutting import Cutting
from collectives.instructions import (
    AwaitSend,
    Fold,
    Instruction,
    Notify,
    PostNote,
    PostPack,
    RunKernel,
    TakeNote,
    TakePack,
)
from collectives.program import compile_program
from collectives.schedule import Schedule
from collectives.topology import Floats, Topology

_EVERYTHING = 2**62
_WINDOW = 4


@dataclass(slots=True)
class _Rank:
    """A rank in the middle of its program."""

    program: tuple[Instruction, ...]
    clock: float = 0.0
    at: int = 0
    left: dict[int, float] = field(default_factory=dict)
    """When each send has left, until it was waited for."""
    inbox: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    """By peer, when its messages are here."""
    awaits: int | None = None
    """The peer without whose message it cannot go on."""


@dataclass(slots=True)
class _Pair:
    """What goes from one rank to another, in order."""

    route: Route
    delay: float
    """The mean of the jitter."""
    entered: float = 0.0
    due: float = 0.0


class Replay:
    """One run. `finish` are the ranks' times, `carried` the bytes by port.

    Args:
        schedule: to be run, every transfer inline, as over sockets.
        topology: where.
        segment, pack: as `Cutting.note` and `Cutting.pack`, elements.
        itemsize: bytes of an element.
        reduce_rate: bytes a second.
        kernel_seconds: how long the kernel of a name takes; None: what `reduce_rate` makes of its range.

    """

    def __init__(
        self,
        schedule: Schedule,
        topology: Topology,
        segment: int,
        pack: int,
        itemsize: int,
        reduce_rate: float,
        kernel_seconds: Callable[[str], float] | None = None,
    ) -> None:
        self._topology = topology
        self._itemsize = itemsize
        self._reduce_rate = reduce_rate
        self._kernel_seconds = kernel_seconds
        cutting = Cutting(segment, _EVERYTHING, segment, _WINDOW, convert=False, lift=True, pack=pack)
        programs = (compile_program(schedule, rank, cutting) for rank in range(schedule.world))
        self._ranks = [_Rank(program.instructions) for program in programs]
        self._pairs: dict[tuple[int, int], _Pair] = {}
        self._taken: defaultdict[int, Intervals] = defaultdict(list)
        self._turns = [(0.0, rank) for rank in range(schedule.world)]
        self.carried = np.zeros(len(topology.ports))

    def run(self) -> Floats:
        """Run all programs to their ends; when each rank is done."""
        while self._turns:
            _, rank = heapq.heappop(self._turns)
            self._go_on(rank)
        unfinished = [rank for rank, state in enumerate(self._ranks) if state.awaits is not None]
        assert not unfinished, f"ranks {unfinished} wait for ever"  # `verify` would have refused such a schedule
        return np.array([state.clock for state in self._ranks])

    def _go_on(self, rank: int) -> None:
        """Let a rank act until it has to wait for a message that is not on its way, or another one's turn has come."""
        state = self._ranks[rank]
        while state.at < len(state.program):
            if self._turns and state.clock > self._turns[0][0]:
                heapq.heappush(self._turns, (state.clock, rank))
                return
            instruction = state.program[state.at]
            if isinstance(instruction, TakeNote | TakePack):
                if not state.inbox[instruction.peer]:
                    state.awaits = instruction.peer
                    return
                state.clock = max(state.clock, state.inbox[instruction.peer].popleft())
            else:
                self._act(rank, state, instruction)
            state.at += 1

    def _act(self, rank: int, state: _Rank, instruction: Instruction) -> None:
        """Do what needs no message."""
        match instruction:
            case PostNote(number, peer, data):
                state.left[number] = self._post(rank, peer, data.stop - data.start)
            case PostPack(number, peer, rows):
                self._post(rank, peer, sum(data.stop - data.start for data in rows))
                state.left[number] = 0.0
            case Notify(peer):
                self._post(rank, peer, 0)
            case AwaitSend(number):
                state.clock = max(state.clock, state.left.pop(number))
            case Fold(_, _, into):
                state.clock += (into.stop - into.start) * self._itemsize / self._reduce_rate
            case RunKernel(kernel) if self._kernel_seconds is not None:
                state.clock += self._kernel_seconds(kernel)
            case RunKernel(_, on):
                state.clock += (on.stop - on.start) * self._itemsize / self._reduce_rate
            case _:  # copies inside a rank count for nothing
                pass

    def _post(self, rank: int, peer: int, elements: int) -> float:
        """Send a message; when it has left."""
        pair = self._pairs.get((rank, peer))
        if pair is None:
            route, delay = route_of(self._topology, rank, peer), jitter_of(self._topology, rank, peer) / 2
            pair = self._pairs[rank, peer] = _Pair(route, delay)
        now, nbytes = self._ranks[rank].clock, elements * self._itemsize

        def take(port: int, head: float, seconds: float) -> tuple[float, float]:
            forget(self._taken[port], now)
            self.carried[port] += nbytes
            return reserve(self._taken[port], head, seconds)

        left, due = cross(pair.route, nbytes, max(now, pair.entered), take)
        pair.entered, pair.due = left, max(pair.due, due + pair.delay)
        receiver = self._ranks[peer]
        receiver.inbox[rank].append(pair.due)
        if receiver.awaits == rank:
            receiver.awaits = None
            heapq.heappush(self._turns, (max(receiver.clock, pair.due), peer))
        return left
