"""Schedules as values: their form, their laziness, and one rank's part against the whole."""

import dataclasses
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest

from collectives.algorithms import bidirectional, dissemination, doubling, ring
from collectives.errors import UsageError
from collectives.schedule import Compute, LocalPart, LocalStep, Recv, Schedule, Send, Step

WHOLE = ((0, 8),)


def schedules(world: int, count: int) -> list[Schedule]:
    made = [doubling.all_reduce(world, count, True), dissemination.barrier(world)]
    for family in (ring, bidirectional):
        made += [
            family.all_reduce(world, count),
            family.all_reduce(world, count, True),
            family.reduce_scatter(world, count, True),
            family.all_gather(world, count),
            family.broadcast(world, count, world // 2),
        ]
    return made


def columns(schedule: Schedule) -> Schedule:
    """The same schedule with explicit columns."""
    ranks = range(schedule.world)
    return Schedule.from_steps(
        schedule.kind,
        schedule.algorithm,
        schedule.world,
        schedule.count,
        [schedule.step(index) for index in range(len(schedule))],
        held=[schedule.held(rank) for rank in ranks],
        wanted=[schedule.wanted(rank) for rank in ranks],
        kernels=schedule.kernels,
    )


def test_one_step_and_one_rank_of_a_ring() -> None:
    schedule = ring.all_reduce(3, 8, finish=True)
    first = schedule.step(0)
    assert first.src.tolist() == [0, 1, 2]
    assert first.dst.tolist() == [1, 2, 0]
    assert list(zip(first.start.tolist(), first.stop.tolist(), strict=True)) == [(6, 8), (0, 3), (3, 6)]
    assert first.combine.all()
    assert schedule.local(1) == LocalPart(
        1,
        (
            LocalStep(0, (Send(2, 0, 3),), (Recv(0, 6, 8, True),), ()),
            LocalStep(1, (Send(2, 6, 8),), (Recv(0, 3, 6, True),), ()),
            LocalStep(2, (), (), (Compute("finish", 3, 6, True),)),
            LocalStep(3, (Send(2, 3, 6),), (Recv(0, 0, 3, False),), ()),
            LocalStep(4, (Send(2, 0, 3),), (Recv(0, 6, 8, False),), ()),
        ),
    )


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 13])
def test_the_part_of_each_rank_follows_from_the_steps(world: int) -> None:
    for count in (0, 1, world - 1, 29):
        for schedule in schedules(world, count):
            explicit = columns(schedule)
            assert len(explicit) == len(schedule)
            for rank in range(world):
                assert schedule.local(rank) == explicit.local(rank)
                assert schedule.held(rank) == explicit.held(rank)
                assert schedule.wanted(rank) == explicit.wanted(rank)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_both_ends_of_a_pair_list_its_transfers_in_one_order(world: int) -> None:
    for schedule in schedules(world, 29):
        sent, received = defaultdict(list), defaultdict(list)
        for rank in range(world):
            for step in schedule.local(rank).steps:
                for send in step.sends:
                    sent[rank, send.peer].append((step.step, send.start, send.stop))
                for recv in step.recvs:
                    received[recv.peer, rank].append((step.step, recv.start, recv.stop))
        assert sent == received


def test_only_notifications_are_empty() -> None:
    for schedule in schedules(8, 3):
        for index in range(len(schedule)):
            step = schedule.step(index)
            assert (step.start == step.stop).all() if schedule.kind == "barrier" else (step.start < step.stop).all()
            assert (step.computes.start < step.computes.stop).all()


def test_4096_ranks_fit_in_memory() -> None:
    tracemalloc.start()
    try:
        schedule = ring.all_reduce(4096, 10**9, finish=True)
        transfers = sum(len(schedule.step(index).src) for index in range(0, len(schedule), 16))
        part = schedule.local(4095)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(schedule) == len(part.steps) == 2 * 4095 + 1
    assert transfers == 512 * 4096
    assert peak < 32 << 20


def test_asking_again_costs_nothing() -> None:
    assert ring.all_reduce(4, 100) is ring.all_reduce(4, 100)
    assert ring.all_reduce(4, 100) is not ring.all_reduce(4, 101)
    assert ring.all_reduce(4, 100).local(2) is ring.all_reduce(4, 100).local(2)


def test_schedules_are_values() -> None:
    schedule = ring.all_reduce(2, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.world = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        schedule.step(0).start[0] = 1
    mine = np.array([0, 1], dtype=np.int32)
    step = dataclasses.replace(schedule.step(0), src=mine)
    explicit = Schedule.from_steps("exchange", "test", 2, 8, [step], [WHOLE] * 2, [WHOLE] * 2)
    mine[0] = 1
    assert explicit.step(0).src.tolist() == [0, 1]
    assert bool(ring.all_reduce(1, 8))


def test_what_is_not_there_is_refused() -> None:
    schedule = ring.all_reduce(2, 8)
    for ask in (schedule.local, schedule.held, schedule.wanted):
        for rank in (-1, 2):
            with pytest.raises(UsageError, match=f"rank {rank} is not in a world of 2"):
                ask(rank)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            schedule.step(index)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step.of([(0, 1, 0, 8, True), (2, 0, 0, 8, True)]), "step 0: transfer 1 comes from no rank of a world of 2"),
        (Step.of([(0, -1, 0, 8, True)]), "goes to no rank"),
        (Step.of([(1, 1, 0, 8, True)]), "from a rank to itself"),
        (Step.of([(0, 1, 0, 9, True)]), r"not within \[0, 8\)"),
        (Step.of([(0, 1, -1, 8, True)]), r"not within \[0, 8\)"),
        (Step.of([(0, 1, 5, 4, True)]), r"not within \[0, 8\)"),
        (Step.of(computes=[(2, 0, 0, 8, True)]), "compute 0 is on no rank"),
        (Step.of(computes=[(1, 1, 0, 8, True)]), "names none of the 1 kernels"),
        (Step.of(computes=[(1, 0, 0, 9, True)]), r"not within \[0, 8\)"),
        (Step.of(computes=[(1, 0, 4, 4, True)]), "empty range"),
        (dataclasses.replace(Step.of([(0, 1, 0, 8, True)]), src=np.zeros(2, np.int32)), "of equal length"),
        (dataclasses.replace(Step.of(), combine=np.zeros(1, np.bool_)), "of equal length"),
    ],
)
def test_columns_of_bad_form_are_refused(step: Step, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule.from_steps("all_reduce", "test", 2, 8, [step], [WHOLE] * 2, [WHOLE] * 2, kernels=("finish",))


def test_held_and_wanted_have_one_entry_a_rank_within_the_buffer() -> None:
    with pytest.raises(UsageError, match="wanted has 1 entries for a world of 2"):
        Schedule.from_steps("exchange", "test", 2, 8, [], [WHOLE] * 2, [WHOLE])
    with pytest.raises(UsageError, match=r"held\[1\]"):
        Schedule.from_steps("exchange", "test", 2, 8, [], [WHOLE, ((4, 9),)], [WHOLE] * 2)


@pytest.mark.parametrize(("world", "count"), [(0, 8), (-2, 8), (2, -1)])
def test_worlds_and_buffers_that_cannot_be_are_refused(world: int, count: int) -> None:
    for make in (ring.all_reduce, ring.reduce_scatter, bidirectional.all_gather, doubling.all_reduce):
        with pytest.raises(UsageError, match="world >= 1 and count >= 0"):
            make(world, count)


@pytest.mark.parametrize("root", [-1, 4])
def test_a_root_that_is_no_rank_is_refused(root: int) -> None:
    with pytest.raises(UsageError, match=f"root {root}"):
        ring.broadcast(4, 8, root)
