"""Compiled programs against a transport that uses memory as badly as it may, on schedules drawn at random.

The transport reads what is sent as late and spoils what is received as early as its contract allows, and lets nobody go
on before the other end is there. So a hazard that a program overlooks becomes a wrong number, and a wait in the wrong
place a deadlock, at each run and not once in a thousand.
"""

import random
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from collectives import choice
from collectives.algorithms import bidirectional, doubling, ring
from collectives.cutting import Cutting
from collectives.engine import Engine
from collectives.errors import OperationTimeout, UsageError
from collectives.instructions import CALLER, STAGING, PostNote, PostPack, PostSend, TakeNote, TakePack, Where
from collectives.program import compile_program
from collectives.region import split
from collectives.schedule import Schedule, Step
from collectives.staging import StagingPool
from collectives.transports.base import Pending, Transport

PATIENCE = 20.0
SPOILED = -12345.0


@dataclass
class Message:
    """A posted send: its receiver copies it when it is waited for, and the sender waits for that."""

    data: memoryview
    taken: threading.Event = field(default_factory=threading.Event)


class Exchange:
    """Where the messages of all ranks meet."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._queues: defaultdict[tuple[int, int, str], list[Message]] = defaultdict(list)

    def put(self, source: int, target: int, kind: str, message: Message) -> None:
        with self._arrived:
            self._queues[source, target, kind].append(message)
            self._arrived.notify_all()

    def take(self, source: int, target: int, kind: str) -> Message:
        queue = self._queues[source, target, kind]
        with self._arrived:
            if not self._arrived.wait_for(lambda: queue, PATIENCE):
                raise OperationTimeout(f"rank {target} waits for {kind} from rank {source}: deadlock")
            return queue.pop(0)


class Sending(Pending):
    def __init__(self, message: Message) -> None:
        self._message = message

    def wait(self) -> None:
        if not self._message.taken.wait(PATIENCE):
            raise OperationTimeout("a send is never received: deadlock")


class Receiving(Pending):
    def __init__(self, exchange: Exchange, source: int, target: int, into: memoryview) -> None:
        self._exchange, self._source, self._target, self._into = exchange, source, target, into

    def wait(self) -> None:
        message = self._exchange.take(self._source, self._target, "bulk")
        self._into[:] = message.data
        message.taken.set()


class HarshTransport(Transport):
    """One rank's end of an Exchange."""

    def __init__(self, exchange: Exchange, rank: int, size: int, inline_limit: int) -> None:
        self.rank, self.size, self.inline_limit = rank, size, inline_limit
        self._exchange = exchange

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        message = Message(data.view(torch.uint8).numpy().data)
        self._exchange.put(self.rank, peer, "bulk", message)
        return Sending(message)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        into.fill_(SPOILED)
        return Receiving(self._exchange, peer, self.rank, into.view(torch.uint8).numpy().data)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        message = Message(note)
        self._exchange.put(self.rank, peer, "note", message)
        return Sending(message)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        self._exchange.put(self.rank, peer, "note", Message(memoryview(bytes(note))))

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        message = self._exchange.take(peer, self.rank, "note")
        data = bytes(message.data)
        message.taken.set()
        return data

    def abort(self) -> None:
        raise AssertionError("not used here")

    def close(self) -> None:
        raise AssertionError("not used here")


def execute(
    schedule: Schedule, buffers: list[Tensor], segment: int, window: int, inline: int, wide: bool = False
) -> list[Tensor]:
    """Run all ranks, a thread each, from what each holds; of every rank the wanted ranges, behind each other."""
    exchange = Exchange()
    dtype = torch.float64 if wide else torch.float32
    results = [torch.empty(0)] * schedule.world
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        held = [buffers[rank][start:stop] for start, stop in schedule.held(rank)]
        source = torch.cat([*held, torch.empty(0)])
        before = source.clone()
        transport = HarshTransport(exchange, rank, schedule.world, inline * dtype.itemsize)
        engine = Engine(StagingPool(), segment * dtype.itemsize, window, segment * dtype.itemsize)
        try:
            program = engine.program(schedule, transport, source.dtype, dtype)
            staging = torch.full((program.footprint,), SPOILED, dtype=dtype)
            engine.run(schedule, transport, 1, source, staging, kernels={"double": lambda piece: piece.mul_(2)})
            assert torch.equal(source, before)
            results[rank] = torch.cat([*program.pieces(source, staging), staging[:0]])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(schedule.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if failures:
        raise failures[0]
    return results


def drawn(seed: int) -> tuple[Schedule, list[Tensor], list[Tensor]]:
    """A random schedule that keeps the rules of `collectives.schedule`, with inputs and what must come out."""
    rng = random.Random(seed)
    world, count = rng.randint(2, 4), rng.choice([64, 5000, 9000])
    cuts = sorted({0, count, *(rng.randrange(count) for _ in range(6))})
    state = [np.array([rng.randrange(5) for _ in range(count)], dtype=np.float64) for _ in range(world)]
    known = [np.zeros(count, dtype=bool) for _ in range(world)]
    held = []
    for rank in range(world):
        ranges = [pair for pair in pairwise(cuts) if rng.random() < 0.7]
        held.append(tuple(ranges))
        for start, stop in ranges:
            known[rank][start:stop] = True
    inputs = [torch.tensor(values, dtype=torch.float32) for values in state]
    steps = [_drawn_step(rng, world, cuts, state, known) for _ in range(rng.randint(2, 9))]
    wanted = [_runs(mask) for mask in known]
    schedule = Schedule.from_steps("exchange", "random", world, count, steps, held, wanted, ("double",))
    return schedule, inputs, [torch.tensor(values, dtype=torch.float64) for values in state]


def _drawn_step(
    rng: random.Random, world: int, cuts: list[int], state: list[np.ndarray], known: list[np.ndarray]
) -> Step:
    """Draw a step and apply it to `state` and `known`: all rows read what was there before it."""
    before, known_before = [values.copy() for values in state], [mask.copy() for mask in known]
    sent, written, copied = ([np.zeros(cuts[-1], dtype=bool) for _ in range(world)] for _ in range(3))
    rows, computes = [], []
    for _ in range(rng.randint(1, 8)):
        source, target = rng.sample(range(world), 2)
        start, stop = sorted(rng.sample(cuts, 2)) if rng.random() < 0.8 else sorted(rng.sample(range(cuts[-1]), 2))
        span = slice(start, stop)
        if not known_before[source][span].all() or copied[source][span].any():
            continue
        combine = bool(known_before[target][span].all()) and rng.random() < 0.6
        if combine and copied[target][span].any():
            continue
        if not combine and (sent[target][span].any() or written[target][span].any()):
            continue
        rows.append((source, target, start, stop, combine))
        sent[source][span] = written[target][span] = True
        copied[target][span] |= not combine
        state[target][span] = state[target][span] + before[source][span] if combine else before[source][span]
        known[target][span] = True
    for rank in range(world):
        start, stop = sorted(rng.sample(cuts, 2))
        span = slice(start, stop)
        free = known_before[rank][span].all() and not (sent[rank][span] | written[rank][span]).any()
        if free and rng.random() < 0.4:
            computes.append((rank, 0, start, stop, rng.random() < 0.5))
            state[rank][span] *= 2
    return Step.of(rows, computes)


def _runs(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_random_schedules_give_what_their_steps_say(seed: int) -> None:
    schedule, inputs, expected = drawn(seed)
    rng = random.Random(seed)
    for inline in (0, 1500, 10**6):
        results = execute(schedule, inputs, 1024, rng.randint(1, 5), inline, wide=rng.random() < 0.3)
        for rank, result in enumerate(results):
            wanted = [expected[rank][start:stop] for start, stop in schedule.wanted(rank)]
            assert torch.equal(result.double(), torch.cat([*wanted, torch.empty(0, dtype=torch.float64)])), inline


@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_algorithms_in_many_segments(world: int, window: int) -> None:
    count = 20_000
    inputs = [torch.arange(count).remainder(7).float() + rank for rank in range(world)]
    expected = torch.stack(inputs).sum(0)
    for factory in (ring.all_reduce, bidirectional.all_reduce, doubling.all_reduce):
        for inline in (0, 10**6):
            for result in execute(factory(world, count), inputs, 1024, window, inline):
                assert torch.equal(result, expected), (factory.__module__, inline)


def test_staging_has_room_for_what_is_written_there_and_no_more() -> None:
    cutting = Cutting(1024, 0, 1024, 4, False, True)
    world, count = 4, 10_000
    blocks = split(count, world)
    direct = [(s, d, *blocks[d], False) for s in range(world) for d in range(world) if s < d]
    schedule = Schedule.from_steps(
        "exchange",
        "by hand",
        world,
        count,
        [Step.of(direct[:3])],
        [((0, count),)] * world,
        [(block,) for block in blocks],
    )
    for rank, program in enumerate(compile_program(schedule, rank, cutting) for rank in range(world)):
        assert program.footprint == blocks[rank][1] - blocks[rank][0]
        assert program.result == (Where(STAGING, 0, program.footprint),)
    unlifted = compile_program(schedule, 0, cutting._replace(lift=False))
    assert unlifted.footprint == 0
    assert unlifted.result == (Where(CALLER, *blocks[0]),)
    assert compile_program(ring.all_reduce(world, count), 1, cutting).footprint == count
    chunks = compile_program(ring.reduce_scatter(world, count), 1, cutting)
    assert chunks.footprint == count - 2500, "a rank sends its first chunk on from the caller's tensor"


@pytest.mark.parametrize("world", [2, 5, 8])
def test_exchanges_keep_what_they_receive_and_no_more(world: int) -> None:
    cutting = Cutting(1024, 0, 1024, 4, False, True)
    count = 40 * world * world

    def footprints(kind: str, algorithm: str) -> list[int]:
        schedule = choice.build(kind, algorithm, world, count)
        return [compile_program(schedule, rank, cutting).footprint for rank in range(world)]

    for algorithm in ("pairwise", "direct"):
        assert footprints("all_to_all", algorithm) == [count // world] * world
    assert footprints("gather", "flat") == [count] + [0] * (world - 1)
    assert footprints("scatter", "flat") == [count // world] * world
    assert footprints("reduce", "flat") == [count] + [0] * (world - 1)


def test_small_rows_to_one_peer_share_a_note() -> None:
    rows = [(0, 1, start, start + 10, False) for start in range(0, 400, 20)]
    rows[7:7] = [(0, 1, 500, 1500, False), (1, 0, 2000, 2001, False)]
    held = [((0, 1500),), ((2000, 2001),)]
    wanted = [((2000, 2001),), ((0, 10), (500, 1500))]
    schedule = Schedule.from_steps("exchange", "by hand", 2, 3000, [Step.of(rows)], held, wanted)
    cutting = Cutting(1024, 2000, 100, 4, False, True, pack=50)
    sender, receiver = (compile_program(schedule, rank, cutting).instructions for rank in (0, 1))
    assert [len(one.data) for one in sender if isinstance(one, PostPack)] == [7, 10, 3]
    assert [len(one.into) for one in receiver if isinstance(one, TakePack)] == [7, 10, 3]
    assert sum(isinstance(one, PostNote) for one in sender) == sum(isinstance(one, TakeNote) for one in receiver)
    assert not any(isinstance(one, PostSend) for one in sender)


def test_a_schedule_that_reads_what_is_nowhere_is_refused() -> None:
    step = Step.of([(0, 1, 0, 10, True)])
    schedule = Schedule.from_steps("exchange", "wrong", 2, 10, [step], [((0, 10),), ()], [(), ((0, 10),)])
    with pytest.raises(UsageError, match="before anything was put there"):
        compile_program(schedule, 1, Cutting(4, 0, 4, 2, False, True))


def test_a_schedule_that_overwrites_what_it_sends_is_refused() -> None:
    before = Step.of([(1, 0, 0, 10, False)])  # so that what rank 0 sends next is in staging
    clash = Step.of([(0, 1, 0, 10, False), (1, 0, 5, 10, False)])
    schedule = Schedule.from_steps("exchange", "wrong", 2, 10, [before, clash], [(), ((0, 10),)], [(), ()])
    with pytest.raises(UsageError, match="that it also sends"):
        compile_program(schedule, 0, Cutting(4, 0, 4, 2, False, True))


def test_a_reduction_that_meets_the_callers_data_first_needs_no_scratch_memory() -> None:
    assert compile_program(ring.all_reduce(4, 10_000), 1, Cutting(1024, 0, 1024, 4, False, True)).scratch == 0
    assert compile_program(doubling.all_reduce(4, 10_000), 1, Cutting(1024, 0, 1024, 4, False, True)).scratch > 0
