"""Every algorithm on numpy arrays, all ranks in one process: in lockstep, and in random order by ranges alone."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from collectives import choice
from collectives.algorithms import bidirectional, dissemination, doubling, ring
from collectives.region import split
from collectives.schedule import Compute, Recv, Schedule, Send
from collectives.verify import REDUCING
from tests.collectives.lockstep import Buffers, finished, lockstep
from tests.collectives.schedules import PLAIN, VARIED

REDUCTIONS = {name: make for name, make in {**PLAIN, **VARIED}.items() if make(1, 1).kind in REDUCING}
MOVES = {name: make for name, make in {**PLAIN, **VARIED}.items() if name not in REDUCTIONS}
WORLDS = [1, 2, 3, 4, 5, 7, 8, 13]


def counts(world: int) -> list[int]:
    return sorted({0, 1, world - 1, world, 53})


def started(schedule: Schedule, values: Buffers, undefined: float) -> Buffers:
    """The values where ranks hold them, elsewhere what must not reach any result."""
    buffers = np.full_like(values, undefined)
    for rank in range(schedule.world):
        for start, stop in schedule.held(rank):
            buffers[rank, start:stop] = values[rank, start:stop]
    return buffers


def results(schedule: Schedule, buffers: Buffers) -> list[tuple[int, int, Buffers]]:
    """What the ranks want: (start, stop, values)."""
    return [
        (start, stop, buffers[rank, start:stop])
        for rank in range(schedule.world)
        for start, stop in schedule.wanted(rank)
    ]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_equal_the_direct_sum(name: str, world: int) -> None:
    for count in counts(world):
        schedule = REDUCTIONS[name](world, count)
        values = np.random.default_rng(count).integers(-1000, 1000, (world, count))
        total = finished(values.sum(axis=0)) if schedule.kernels else values.sum(axis=0)
        for start, stop, ended in results(schedule, lockstep(schedule, values)):
            assert (ended == total[start:stop]).all()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_float_bits_are_equal_on_all_ranks(name: str, world: int) -> None:
    schedule = REDUCTIONS[name](world, 53)
    values = np.random.default_rng(world).lognormal(0, 9, (world, 53)).astype(np.float32)
    total = values.sum(axis=0, dtype=np.float64)
    total = finished(total) if schedule.kernels else total
    bits: dict[tuple[int, int], bytes] = {}
    for start, stop, ended in results(schedule, lockstep(schedule, values)):
        assert bits.setdefault((start, stop), ended.tobytes()) == ended.tobytes()
        np.testing.assert_allclose(ended, total[start:stop], rtol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MOVES)
def test_moves_bring_the_holders_values(name: str, world: int) -> None:
    for count in counts(world):
        schedule = MOVES[name](world, count)
        values = np.random.default_rng(count).random((world, schedule.count))
        holder = np.zeros(schedule.count, dtype=np.int64)
        for rank in range(world):
            for start, stop in schedule.held(rank):
                holder[start:stop] = rank
        source = values[holder, np.arange(schedule.count)]
        for start, stop, ended in results(schedule, lockstep(schedule, started(schedule, values, np.nan))):
            assert (ended == source[start:stop]).all()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_who_holds_and_wants_what(world: int) -> None:
    whole, pieces = ((0, 20),), split(20, world)
    for family in (ring, bidirectional):
        for rank in range(world):
            assert family.all_reduce(world, 20).held(rank) == family.all_reduce(world, 20).wanted(rank) == whole
            assert family.reduce_scatter(world, 20).held(rank) == whole
            assert family.reduce_scatter(world, 20).wanted(rank) == (pieces[rank],)
            assert family.all_gather(world, 20).held(rank) == (pieces[rank],)
            assert family.all_gather(world, 20).wanted(rank) == whole
            assert family.broadcast(world, 20, 0).held(rank) == (whole if rank == 0 else ())
            assert family.broadcast(world, 20, 0).wanted(rank) == whole
            assert doubling.all_reduce(world, 20).held(rank) == doubling.all_reduce(world, 20).wanted(rank) == whole
            assert dissemination.barrier(world).held(rank) == dissemination.barrier(world).wanted(rank) == ()
    assert ring.all_gather(3, 2).held(2) == ()


def sent(schedule: Schedule, rank: int) -> int:
    return sum(send.stop - send.start for step in schedule.local(rank).steps for send in step.sends)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_steps_and_elements_are_as_documented(world: int) -> None:
    count = 24 * world
    for family in (ring, bidirectional):
        assert len(family.all_reduce(world, count)) == 2 * (world - 1)
        for make in (family.reduce_scatter, family.all_gather):
            assert len(make(world, count)) == world - 1
            assert {sent(make(world, count), rank) for rank in range(world)} == {(world - 1) * 24}
        assert len(family.broadcast(world, count, 1)) == world - 1
        assert sum(sent(family.broadcast(world, count, 1), rank) for rank in range(world)) == (world - 1) * count
    assert len(dissemination.barrier(world)) == {2: 1, 3: 2, 8: 3}[world]
    assert len(doubling.all_reduce(world, count)) == {2: 1, 3: 3, 8: 3}[world]


def test_the_bidirectional_ring_loads_both_directions_alike() -> None:
    step = bidirectional.all_reduce(5, 100).step(0)
    forward = (step.dst - step.src) % 5 == 1
    assert (step.stop - step.start)[forward].sum() == (step.stop - step.start)[~forward].sum() == 50


@pytest.mark.parametrize("name", [*REDUCTIONS, *MOVES])
def test_a_world_of_one_only_finishes(name: str) -> None:
    schedule = {**REDUCTIONS, **MOVES}[name](1, 20)
    computes = [compute for step in schedule.local(0).steps for compute in step.computes]
    assert len(schedule) == len(schedule.kernels)
    assert computes == [Compute("finish", 0, 20, True)] * len(schedule.kernels)


@pytest.mark.parametrize("name", [*REDUCTIONS, *MOVES])
def test_a_ranks_part_are_its_rows_of_all_steps(name: str) -> None:
    for world in (2, 5, 8, 13):
        schedule = {**REDUCTIONS, **MOVES}[name](world, 53)
        steps = [schedule.step(index) for index in range(len(schedule))]
        explicit = Schedule.from_steps(
            schedule.kind,
            schedule.algorithm,
            world,
            schedule.count,
            steps,
            [schedule.held(rank) for rank in range(world)],
            [schedule.wanted(rank) for rank in range(world)],
            schedule.kernels,
        )
        for rank in range(world):
            mine, same = schedule.local(rank).steps, explicit.local(rank).steps
            assert [step.step for step in mine] == [step.step for step in same]
            for step, other in zip(mine, same, strict=True):
                assert by_peer(step.sends) == by_peer(other.sends)
                assert step.recvs == other.recvs
                assert step.computes == other.computes


def by_peer(sends: tuple[Send, ...]) -> dict[int, list[Send]]:
    """Sends in the order that each peer sees."""
    return {send.peer: [other for other in sends if other.peer == send.peer] for send in sends}


@dataclass
class Row:
    """A row of one rank, for a run out of lockstep."""

    step: int
    number: int
    """Its place among the rows of the step."""
    what: Send | Recv | Compute
    scratch: Buffers | None = None
    """What a combining receive has taken, until it may be folded in."""
    done: bool = False

    @property
    def combines(self) -> bool:
        return isinstance(self.what, Recv) and self.what.combine

    def waits_for(self, other: "Row") -> bool:
        """Rules 2 and 4 of `collectives.schedule`, for rows of one rank."""
        if other.done or other.what.start >= self.what.stop or self.what.start >= other.what.stop:
            return False
        if isinstance(self.what, Send):
            return other.step < self.step and not isinstance(other.what, Send)
        if self.combines and other.step == self.step:
            return isinstance(other.what, Send) or (other.combines and other.number < self.number)
        return other.step < self.step


def rows_of(schedule: Schedule, rank: int) -> list[Row]:
    rows: list[Row] = []
    for step in schedule.local(rank).steps:
        whats: list[Send | Recv | Compute] = [*step.sends, *step.recvs, *step.computes]
        rows += [Row(step.step, number, what) for number, what in enumerate(whats)]
    return rows


def out_of_lockstep(schedule: Schedule, buffers: Buffers, chance: random.Random) -> Buffers:
    """Run each rank's rows as soon as their ranges allow it, in random order, with rendezvous and a FIFO per pair."""
    buffers = buffers.copy()
    ranks = [rows_of(schedule, rank) for rank in range(schedule.world)]
    pairs = list(itertools.permutations(range(schedule.world), 2))
    out = {
        (a, b): deque(row for row in ranks[a] if isinstance(row.what, Send) and row.what.peer == b) for a, b in pairs
    }
    into = {
        (a, b): deque(row for row in ranks[b] if isinstance(row.what, Recv) and row.what.peer == a) for a, b in pairs
    }

    def free(rank: int, row: Row) -> bool:
        return not any(row.waits_for(other) for other in ranks[rank])

    def moves() -> Iterator[Callable[[], None]]:
        for pair in pairs:
            if out[pair] and free(pair[0], out[pair][0]):
                row = into[pair][0]
                if row.combines or free(pair[1], row):
                    yield partial(transfer, *pair)
        for rank, rows in enumerate(ranks):
            for row in rows:
                if not row.done and (row.scratch is not None or isinstance(row.what, Compute)) and free(rank, row):
                    yield partial(write, rank, row)

    def transfer(src: int, dst: int) -> None:
        send, recv = out[src, dst].popleft(), into[src, dst].popleft()
        assert (send.what.start, send.what.stop) == (recv.what.start, recv.what.stop)
        send.done = True
        data = buffers[src, send.what.start : send.what.stop].copy()
        if recv.combines:
            recv.scratch = data
        else:
            buffers[dst, recv.what.start : recv.what.stop] = data
            recv.done = True

    def write(rank: int, row: Row) -> None:
        place = buffers[rank, row.what.start : row.what.stop]
        place[:] = finished(place) if row.scratch is None else place + row.scratch
        row.done = True

    while ready := list(moves()):
        chance.choice(ready)()
    assert all(row.done for rows in ranks for row in rows), "the ranks wait for each other"
    return buffers


@pytest.mark.parametrize("name", [*REDUCTIONS, *MOVES])
@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_ranges_alone_order_the_work(name: str, world: int) -> None:
    schedule = {**REDUCTIONS, **MOVES}[name](world, 13)
    values = np.random.default_rng(world).lognormal(0, 9, (world, schedule.count)).astype(np.float32)
    buffers = started(schedule, values, np.nan)
    expected = results(schedule, lockstep(schedule, buffers))
    for seed in range(4):
        ended = results(schedule, out_of_lockstep(schedule, buffers, random.Random(seed)))
        for (start, stop, mine), (_, _, theirs) in zip(ended, expected, strict=True):
            assert mine.tobytes() == theirs.tobytes(), (start, stop)


def test_a_step_of_thousands_of_ranks_is_made_on_demand() -> None:
    world, chance = 4096, random.Random(7)
    hosts = [rank // 8 for rank in range(world)]
    for kind, name in (
        ("all_reduce", "ring"),
        ("all_reduce", "halving_doubling"),
        ("all_reduce", "double_tree"),
        ("all_reduce", "hierarchical"),
        ("broadcast", "flat"),
        ("broadcast", "hierarchical"),
        ("gather", "binomial"),
        ("all_to_all", "pairwise"),
    ):
        schedule = choice.build(kind, name, world, world * world, hosts=hosts)
        index = chance.randrange(len(schedule))
        step = schedule.step(index)
        assert len(step.src) <= 8 * world
        rank = int(step.src[0]) if len(step.src) else 0
        mine = [each for each in schedule.local(rank).steps if each.step == index]
        assert len(mine[0].sends if mine else ()) == (step.src == rank).sum()


def test_the_trees_share_the_load() -> None:
    """Who is an inner rank of one tree is a leaf of the other, so that nobody sends more than twice the buffer."""
    for world in range(2, 40):
        loads = [sent(choice.build("all_reduce", "double_tree", world, 1000), rank) for rank in range(world)]
        assert max(loads) <= 2 * 1000
        assert len(choice.build("reduce", "double_tree", world, 1000)) <= (world - 1).bit_length()


def test_elements_cross_between_hosts_once() -> None:
    """Out of each host goes what a ring of single-rank hosts would send, whatever the hosts' sizes."""
    count, hosts = 24 * 60, [0, 0, 0, 1, 1, 2, 2, 2, 2, 1]
    for kind in ("reduce_scatter", "all_gather", "all_reduce"):
        schedule = choice.build(kind, "hierarchical", len(hosts), count, hosts=hosts)
        steps = [schedule.step(index) for index in range(len(schedule))]
        crossing = 0
        for step in steps:
            far = np.array(hosts)[step.src] != np.array(hosts)[step.dst]
            crossing += int((step.stop - step.start)[far].sum())
        assert crossing == (2 if kind == "all_reduce" else 1) * (3 - 1) * count
