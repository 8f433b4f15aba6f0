"""The proof accepts every algorithm for worlds of 1 to 64, and refuses every mutation of them."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collectives.algorithms import dissemination
from collectives.errors import ScheduleError
from collectives.region import Ranges
from collectives.schedule import Schedule, Step
from collectives.verify import verify
from tests.collectives.schedules import PLAIN, VARIED, Maker

BARRIER: dict[str, Maker] = {"dissemination barrier": lambda world, count: dissemination.barrier(world)}
ALGORITHMS = {**VARIED, **BARRIER}
"""What is mutated: varied schedules can go wrong in every way in which plain ones can."""
FINISHING = [name for name, make in ALGORITHMS.items() if make(2, 2).kernels]

Row = tuple[int, int, int, int, bool]
"""(src, dst, start, stop, combine) or (rank, kernel, start, stop, elementwise)."""


@pytest.mark.parametrize("name", [*PLAIN, *BARRIER])
def test_every_algorithm_is_proven_for_worlds_of_1_to_64(name: str) -> None:
    make = {**PLAIN, **BARRIER}[name]
    for world in range(1, 65):
        verify(make(world, (world - 1, 211)[world % 2]))
    for world in (1, 2, 5, 8):
        for count in (0, 1):
            verify(make(world, count))


@pytest.mark.parametrize("name", VARIED)
def test_every_algorithm_is_proven_with_all_that_it_takes(name: str) -> None:
    for world in (*range(1, 20), 31, 64):
        verify(VARIED[name](world, (world - 1, 211)[world % 2]))


def table(*columns: npt.NDArray[Any]) -> tuple[Row, ...]:
    return tuple(zip(*(values.tolist() for values in columns), strict=True))


@dataclass(frozen=True)
class Draft:
    """A schedule taken apart, to be changed and put together again."""

    schedule: Schedule
    steps: tuple[tuple[Row, ...], ...]
    computes: tuple[tuple[Row, ...], ...]

    @classmethod
    def of(cls, schedule: Schedule) -> "Draft":
        steps = [schedule.step(index) for index in range(len(schedule))]
        works = [step.computes for step in steps]
        return cls(
            schedule,
            tuple(table(step.src, step.dst, step.start, step.stop, step.combine) for step in steps),
            tuple(table(work.rank, work.kernel, work.start, work.stop, work.elementwise) for work in works),
        )

    def built(self) -> Schedule:
        ranks = range(self.schedule.world)
        return Schedule.from_steps(
            self.schedule.kind,
            "mutant",
            self.schedule.world,
            self.schedule.count,
            [Step.of(rows, works) for rows, works in zip(self.steps, self.computes, strict=True)],
            held=[self.schedule.held(rank) for rank in ranks],
            wanted=[self.schedule.wanted(rank) for rank in ranks],
            kernels=self.schedule.kernels,
        )

    def each_row(self, change: Callable[[Row], list[Row]]) -> Iterator["Draft"]:
        """Drafts with one transfer replaced by what `change` makes of it."""
        for index, rows in enumerate(self.steps):
            for at, row in enumerate(rows):
                if (changed := change(row)) != [row]:
                    step = (*rows[:at], *changed, *rows[at + 1 :])
                    yield replace(self, steps=(*self.steps[:index], step, *self.steps[index + 1 :]))

    def each_compute(self, change: Callable[[Row], list[Row]]) -> Iterator["Draft"]:
        """Drafts with one computation replaced by what `change` makes of it."""
        for index, rows in enumerate(self.computes):
            for at, row in enumerate(rows):
                step = (*rows[:at], *change(row), *rows[at + 1 :])
                yield replace(self, computes=(*self.computes[:index], step, *self.computes[index + 1 :]))


def redirected(world: int) -> Callable[[Row], list[Row]]:
    def change(row: Row) -> list[Row]:
        src, dst, start, stop, combine = row
        other = next((rank for rank in range(world) if rank not in (src, dst)), dst)
        return [(src, other, start, stop, combine)]

    return change


def shifted(count: int) -> Callable[[Row], list[Row]]:
    def change(row: Row) -> list[Row]:
        src, dst, start, stop, combine = row
        by = 1 if stop < count else -1 if start > 0 else 0
        return [(src, dst, start + by, stop + by, combine)]

    return change


def flipped(row: Row) -> list[Row]:
    return [(*row[:4], not row[4])] if row[2] < row[3] else [row]


def shortened(row: Row) -> list[Row]:
    return [(row[0], row[1], row[2], row[3] - 1, row[4])] if row[2] < row[3] else [row]


def shortened_finish(row: Row) -> list[Row]:
    return shortened(row) if row[3] - row[2] > 1 else []


def mutants(schedule: Schedule) -> Iterator[tuple[str, Draft]]:
    draft = Draft.of(schedule)
    changes: dict[str, Callable[[Row], list[Row]]] = {
        "drop a row": lambda row: [],
        "duplicate a row": lambda row: [row, row],
        "swap a destination": redirected(schedule.world),
        "flip combine": flipped,
        "shift a range": shifted(schedule.count),
        "shorten a range": shortened,
    }
    for what, change in changes.items():
        yield from ((what, mutant) for mutant in draft.each_row(change))
    yield from (("omit a finish", mutant) for mutant in draft.each_compute(lambda row: []))
    yield from (("finish twice at once", mutant) for mutant in draft.each_compute(lambda row: [row, row]))
    yield from (("shorten a finish", mutant) for mutant in draft.each_compute(shortened_finish) if schedule.count > 9)


def is_right(draft: Draft) -> bool:
    """Whether a run on numbers ends as it should.

    Each rank adds `16**r` and so counts in a digit of its own, "finish" in another, and what is undefined in a third.
    What is wanted must be the sum of its holders' numbers. In a barrier ranks pass on sets of whom they have heard.
    """
    schedule = draft.schedule
    if schedule.kind == "barrier":
        return all(len(heard) == schedule.world for heard in heard_of(draft))
    finish, undefined = 16**schedule.world, 16 ** (schedule.world + 1)
    after = np.full((schedule.world, schedule.count), undefined)
    total = np.full(schedule.count, finish * len(schedule.kernels))
    for rank in range(schedule.world):
        for start, stop in schedule.held(rank):
            after[rank, start:stop] = 16**rank
            total[start:stop] += 16**rank
    for rows, works in zip(draft.steps, draft.computes, strict=True):
        before = after.copy()
        for src, dst, start, stop, combine in rows:
            after[dst, start:stop] = before[src, start:stop] + combine * after[dst, start:stop]
        for rank, _, start, stop, _ in works:
            after[rank, start:stop] += finish
    wanted = [(rank, start, stop) for rank in range(schedule.world) for start, stop in schedule.wanted(rank)]
    return all((after[rank, start:stop] == total[start:stop]).all() for rank, start, stop in wanted)


def heard_of(draft: Draft) -> list[set[int]]:
    heard = [{rank} for rank in range(draft.schedule.world)]
    for rows in draft.steps:
        before = [set(one) for one in heard]
        for src, dst, *_ in rows:
            heard[dst] |= before[src]
    return heard


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_mutation_of_every_row_is_refused(name: str, world: int) -> None:
    schedule = ALGORITHMS[name](world, 11)
    verify(Draft.of(schedule).built())
    assert is_right(Draft.of(schedule))
    tried = set()
    for what, mutant in mutants(schedule):
        tried.add(what)
        if what == "swap a destination" and is_right(mutant):
            continue  # another rank on the way may reduce it, or pass the word on, just as well
        with pytest.raises(ScheduleError, match="mutant"):
            verify(mutant.built())
    assert {"drop a row", "duplicate a row"} <= tried
    assert ("omit a finish" in tried) == (name in FINISHING)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_whatever_is_accepted_is_right(name: str) -> None:
    chance = random.Random(name)
    accepted = 0
    for _ in range(60):
        schedule = ALGORITHMS[name](chance.choice([3, 4]), 11)
        draft = Draft.of(schedule)
        for change in (redirected(schedule.world), redirected(schedule.world), shifted(schedule.count)):
            if chance.random() < 0.5:
                draft = chance.choice([draft, *draft.each_row(change)])
        try:
            verify(draft.built())
        except ScheduleError:
            continue
        accepted += 1
        assert is_right(draft)
    assert accepted


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_left_out_or_joined_with_one_that_needs_it_is_refused(name: str) -> None:
    draft = Draft.of(ALGORITHMS[name](8 if "barrier" in name else 5, 11))
    for index in range(len(draft.steps)):
        steps, computes = list(draft.steps), list(draft.computes)
        left_out = replace(
            draft, steps=(*steps[:index], *steps[index + 1 :]), computes=(*computes[:index], *computes[index + 1 :])
        )
        with pytest.raises(ScheduleError):
            verify(left_out.built())
        if index + 1 < len(steps):
            steps[index : index + 2] = [steps[index] + steps[index + 1]]
            computes[index : index + 2] = [computes[index] + computes[index + 1]]
            joined = replace(draft, steps=tuple(steps), computes=tuple(computes))
            if is_right(joined):
                continue  # neither step needs the other
            with pytest.raises(ScheduleError):
                verify(joined.built())


@pytest.mark.parametrize("name", FINISHING)
def test_a_finish_too_many_or_too_early_is_refused(name: str) -> None:
    draft = Draft.of(ALGORITHMS[name](3, 11))
    finish = next(works for works in draft.computes if works)
    again = replace(draft, steps=(*draft.steps, ()), computes=(*draft.computes, finish))
    with pytest.raises(ScheduleError, match="finishes it again"):
        verify(again.built())
    early = replace(draft, steps=((), *draft.steps), computes=(finish, *((),) * len(draft.steps)))
    with pytest.raises(ScheduleError, match="finishes it before it is fully reduced"):
        verify(early.built())


WHOLE: Ranges = ((0, 8),)


def explicit(kind: str, world: int, *steps: Step, held: list[Ranges], wanted: list[Ranges]) -> Schedule:
    return Schedule.from_steps(kind, "test", world, 8, steps, held, wanted, kernels=("norm",))


def test_the_message_names_the_step_rank_and_range() -> None:
    step = Step.of([(0, 1, 0, 5, True), (1, 0, 0, 8, True)])
    schedule = explicit("all_reduce", 2, step, held=[WHOLE] * 2, wanted=[WHOLE] * 2)
    expected = r"test all_reduce of 8 elements over 2 ranks: rank 1, range \[5, 8\): lacks .* ranks \[0\] at the end"
    with pytest.raises(ScheduleError, match=expected):
        verify(schedule)
    with pytest.raises(
        ScheduleError, match=r"rank 1, range \[0, 8\): step 0 reduces from rank 0 what is in it already"
    ):
        verify(explicit("reduce", 2, Step.of([(0, 1, 0, 8, True)] * 2), held=[WHOLE] * 2, wanted=[(), WHOLE]))


@pytest.mark.parametrize(
    ("rows", "works", "message"),
    [
        ([(0, 1, 0, 8, False), (1, 0, 4, 8, False)], [], "rank 0, range .4, 8.: step 0 overwrites it and sends it"),
        ([(0, 2, 0, 5, False), (1, 2, 4, 8, False)], [], "rank 2, range .4, 5.: step 0 overwrites it with two copies"),
        ([(0, 2, 0, 5, False), (1, 2, 4, 8, True)], [], "rank 2, range .4, 5.: step 0 overwrites it and reduces"),
        ([(0, 1, 0, 8, False)], [(0, 0, 2, 3, True)], "rank 0, range .2, 3.: step 0 computes on it and sends"),
        ([(0, 1, 0, 8, True)], [(1, 0, 2, 3, True)], "rank 1, range .2, 3.: step 0 computes on it and writes"),
        ([], [(1, 0, 0, 3, True), (1, 0, 2, 8, True)], "rank 1, range .2, 3.: step 0 computes on it twice"),
    ],
)
def test_what_depends_on_timing_is_refused(rows: list[Row], works: list[Row], message: str) -> None:
    schedule = explicit("exchange", 3, Step.of(rows, works), held=[WHOLE] * 3, wanted=[()] * 3)
    with pytest.raises(ScheduleError, match=message):
        verify(schedule)


def test_what_is_undefined_must_not_be_used() -> None:
    def refused(step: Step, message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            verify(explicit("exchange", 3, step, held=[WHOLE, (), ((0, 4),)], wanted=[()] * 3))

    refused(
        Step.of([(2, 1, 2, 6, False)]), r"rank 1, range \[4, 6\): step 0 writes it from rank 2, where it is undefined"
    )
    refused(Step.of([(0, 1, 0, 8, True)]), r"rank 1, range \[0, 4\): step 0 reduces from rank 0 into what is undefined")
    refused(Step.of(computes=[(1, 0, 0, 8, True)]), r"step 0 computes on what is undefined")


def test_an_exchange_wants_one_holders_value_wherever_it_was() -> None:
    held: list[Ranges] = [((0, 4),), ((4, 8),), ((2, 6),)]
    rows = [(0, 2, 0, 2, False), (1, 2, 6, 8, False), (2, 0, 4, 6, False)]
    verify(explicit("exchange", 3, Step.of(rows), held=held, wanted=[((2, 6),), (), WHOLE]))
    with pytest.raises(ScheduleError, match=r"rank 0, range \[6, 8\): is undefined at the end"):
        verify(explicit("exchange", 3, Step.of(rows), held=held, wanted=[WHOLE, (), WHOLE]))
    with pytest.raises(ScheduleError, match=r"rank 2, range \[4, 6\): mixes the contributions of ranks \[1, 2\]"):
        verify(explicit("exchange", 3, Step.of([(1, 2, 4, 6, True)]), held=held, wanted=[(), (), ((4, 6),)]))


def test_a_reduction_wants_all_holders_and_no_others() -> None:
    held: list[Ranges] = [WHOLE, ((0, 4),), ((4, 8),)]
    rows = [(1, 0, 0, 4, True), (2, 0, 4, 8, True)]
    verify(explicit("reduce", 3, Step.of(rows), held=held, wanted=[WHOLE, (), ()]))
    with pytest.raises(ScheduleError, match="is undefined at the end"):
        verify(explicit("reduce", 3, held=[(), (), ()], wanted=[WHOLE, (), ()]))


def test_several_transfers_reduce_into_one_range_in_the_order_of_rows() -> None:
    gather = Step.of([(1, 0, 0, 8, True), (2, 0, 0, 8, True)])
    verify(explicit("reduce", 3, gather, held=[WHOLE] * 3, wanted=[WHOLE, (), ()]))


def test_sums_in_another_order_on_another_rank_are_refused() -> None:
    direct = Step.of([(src, dst, 0, 8, True) for dst in range(3) for src in range(3) if src != dst])
    schedule = explicit("all_reduce", 3, direct, held=[WHOLE] * 3, wanted=[WHOLE] * 3)
    with pytest.raises(ScheduleError, match="is not reduced in the same order as on rank"):
        verify(schedule)
    pair = Step.of([(0, 1, 0, 8, True), (1, 0, 0, 8, True)])
    verify(explicit("all_reduce", 2, pair, held=[WHOLE] * 2, wanted=[WHOLE] * 2))


def test_a_kernel_that_ran_on_one_rank_only_is_refused() -> None:
    pair, norm = Step.of([(0, 1, 0, 8, True), (1, 0, 0, 8, True)]), Step.of(computes=[(1, 0, 0, 8, True)])
    with pytest.raises(ScheduleError, match="bits may differ"):
        verify(explicit("all_reduce", 2, pair, norm, held=[WHOLE] * 2, wanted=[WHOLE] * 2))


def test_nothing_done_is_refused_where_something_is_wanted() -> None:
    for kind, held in (("all_reduce", [WHOLE] * 2), ("broadcast", [WHOLE, ()])):
        with pytest.raises(ScheduleError, match="at the end"):
            verify(explicit(kind, 2, held=held, wanted=[WHOLE] * 2))
    verify(explicit("exchange", 2, held=[WHOLE] * 2, wanted=[WHOLE] * 2))


def test_a_barrier_moves_no_data_and_lets_nobody_leave_early() -> None:
    def barrier(*steps: Step) -> Schedule:
        return explicit("barrier", 3, *steps, held=[()] * 3, wanted=[()] * 3)

    come, go = Step.of([(1, 0, 0, 0, False), (2, 0, 0, 0, False)]), Step.of([(0, 1, 0, 0, False), (0, 2, 0, 0, False)])
    verify(barrier(come, go))
    with pytest.raises(ScheduleError, match="rank 1 leaves without having heard of rank 2"):
        verify(barrier(go, come))
    with pytest.raises(ScheduleError, match="step 1 moves or computes data"):
        verify(barrier(come, Step.of([(0, 1, 0, 1, False)])))


@pytest.mark.parametrize(
    ("kind", "held", "wanted", "message"),
    [
        ("all_reduce", [WHOLE] * 2, [WHOLE, ()], "must be wanted whole by every rank"),
        ("reduce_scatter", [WHOLE] * 2, [WHOLE, WHOLE], "must be wanted by exactly one rank in each element"),
        ("reduce", [WHOLE] * 2, [WHOLE, ((0, 1),)], "must be wanted whole by one rank and not at all by others"),
        ("all_gather", [((0, 4),), ((3, 8),)], [WHOLE] * 2, "must be held by exactly one rank in each element"),
        ("gather", [((0, 4),), ((4, 7),)], [WHOLE, ()], "must be held by exactly one rank in each element"),
        ("broadcast", [WHOLE, ((0, 1),)], [WHOLE] * 2, "must be held whole by one rank and not at all by others"),
        ("scatter", [WHOLE, ()], [((0, 4),), ()], "must be wanted by exactly one rank in each element"),
        ("all_to_all", [((0, 4),), ((4, 8),)], [WHOLE, WHOLE], "must be wanted by exactly one rank in each element"),
    ],
)
def test_a_kind_is_between_the_ranks_that_it_is_about(
    kind: str, held: list[Ranges], wanted: list[Ranges], message: str
) -> None:
    with pytest.raises(ScheduleError, match=f"the buffer {message}"):
        verify(explicit(kind, 2, held=held, wanted=wanted))
