"""Whether it pays to split the tokens of a woven stack (`parallel.overlap`), and where.

`predict` is quick and serves `choose_split`, which users call. `simulated` follows every message of all layers by the
exact simulator; the benchmark and the tests hold `predict` and the choice to it.
"""

from dataclasses import dataclass

import numpy as np

from collectives.algorithms.dissemination import barrier
from collectives.algorithms.draft import Draft
from collectives.algorithms.weave import weave
from collectives.region import Ints, split
from collectives.simulate import simulate
from collectives.topology import NO_PORT, Topology
from parallel.overlap import WovenShape

LEAST_GAIN = 0.01
"""A split must be expected to save this share of the time: the expectation may be off by as much."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a layer costs a member: seconds for `tokens` tokens are `fixed + tokens * each`, for half a block.

    `itemsize` are the bytes of an element. `exchange` are seconds that a weave takes besides its transfers and the
    latencies of its header and its confirmation: Python, copies, the norm.
    """

    fixed: float
    each: float
    itemsize: int = 4
    exchange: float = 1.5e-3

    def seconds(self, tokens: int) -> float:
        """Of half a block: attention, or the perceptron."""
        return self.fixed + tokens * self.each if tokens else 0.0


def choose_split(shape: WovenShape, tokens: int, world: int, load: Load, network: Topology) -> int:
    """Tokens of the first half that take least time by `predict`; `tokens` (no split) unless one saves LEAST_GAIN."""
    whole = predict(shape, tokens, tokens, world, load, network)
    points = sorted({tokens * eighths // 8 for eighths in (3, 4, 5)} - {0, tokens})
    times = {point: predict(shape, tokens, point, world, load, network) for point in points}
    best = min(times, key=times.__getitem__, default=tokens)
    return best if times and times[best] < (1 - LEAST_GAIN) * whole else tokens


def predict(shape: WovenShape, tokens: int, split_at: int, world: int, load: Load, network: Topology) -> float:
    """Seconds of a forward pass: the halves compute in turn, and each waits for its own weave.

    The weaves of both go one after the other; how long the transfers of each take is the simulator's word.
    """
    halves = [count for count in (split_at, tokens - split_at) if count]
    weaves = [_exchanged(world, count, shape.width, load, network) for count in halves]
    ready, clock, lane = [0.0] * len(halves), 0.0, 0.0
    for _ in range(2 * shape.layers):
        for number, count in enumerate(halves):
            clock = max(clock, ready[number]) + load.seconds(count)
            lane = ready[number] = max(clock, lane) + weaves[number]
    return lane


def simulated(shape: WovenShape, tokens: int, split_at: int, world: int, load: Load, network: Topology) -> float:
    """Seconds of a forward pass, message by message.

    A member is two ranks of one schedule, as it is two threads: one that computes and that of the lane, with a link
    without cost between them and the member's ports towards others.
    """
    halves = [count for count in (split_at, tokens - split_at) if count]
    draft = Draft("woven stack", "direct", _THREADS * world)
    for turn in range(2 * shape.layers):
        for number, count in enumerate(halves):
            _weave_once(draft, turn, len(halves), number, (world, count, shape.width))
    seconds = {_NOTHING: 0.0, _SETTLE: _agreeing(world, network) + load.exchange if world > 1 else 0.0}
    seconds |= {_compute(number): load.seconds(count) for number, count in enumerate(halves)}
    threads = _threads(network, world)
    return simulate(draft.built(), threads, itemsize=load.itemsize, kernel_seconds=seconds.__getitem__, exact=True).time


# --- a stack as one schedule ---

_THREADS = 2
_NOTHING, _SETTLE = "nothing", "settle"
_STEPS = 8
"""Of one exchange: computed, told to the lane, released, summed, normed, gathered, settled, told back."""


def _compute(number: int) -> str:
    return f"compute half {number}"


def _weave_once(draft: Draft, turn: int, halves: int, number: int, sizes: tuple[int, int, int]) -> None:
    """Add one computation of one half and the exchange behind it, to steps of their own."""
    world, tokens, width = sizes
    first = (turn * halves + number) * _STEPS
    parts = [(stop - start) * width for start, stop in split(tokens, world)]

    def token(name: str, rank: int) -> tuple[int, int]:
        return draft.region((name, number, rank), 1)

    for rank in range(world):
        main, lane = _THREADS * rank, _THREADS * rank + 1
        summed = [draft.region(("sum", number, part), size) for part, size in enumerate(parts)]
        gathered = [draft.region(("all", number, part), size) for part, size in enumerate(parts)]
        start, done = token("start", rank), token("done", rank)
        if not turn:
            draft.hold(main, ("done", number, rank), 1)
        draft.compute(first, main, _compute(number), [start], [done])
        draft.move(first + 1, main, lane, start)
        draft.compute(first + 2, lane, _NOTHING, summed, [start])
        for other in [(rank + ahead) % world for ahead in range(1, world)]:
            theirs = _THREADS * other + 1
            draft.move(first + 3, lane, theirs, summed[other], combine=True)
            draft.move(first + 5, lane, theirs, gathered[rank])
        draft.compute(first + 4, lane, _NOTHING, [gathered[rank]], [summed[rank]])
        draft.compute(first + 6, lane, _SETTLE, [done], gathered)
        draft.move(first + 7, lane, main, done)
        draft.want(main, ("done", number, rank), 1)


def _threads(network: Topology, world: int) -> Topology:
    """The network of the threads of all members."""

    def router(src: Ints, dst: Ints) -> Ints:
        one, other = src // _THREADS, dst // _THREADS
        apart = one != other
        routes = network.routes(one, np.where(apart, other, (one + 1) % world))
        return np.where(apart[:, None], routes, NO_PORT)

    ports = [(name, network.link(number)) for number, name in enumerate(network.ports)]
    return Topology.of(f"threads on {network.name}", _THREADS * world, ports, router)


# --- one exchange ---


def _exchanged(world: int, tokens: int, width: int, load: Load, network: Topology) -> float:
    """Seconds of a weave."""
    if world == 1:
        return 0.0
    moving = simulate(weave(world, tokens, width), network, itemsize=load.itemsize).time
    return moving + _agreeing(world, network) + load.exchange


def _agreeing(world: int, network: Topology) -> float:
    """Seconds of a header, one message behind the other, and of the confirmation, which is a barrier."""
    rounds = (world - 1).bit_length()
    return simulate(barrier(world), network).time * (1 + 1 / rounds)
