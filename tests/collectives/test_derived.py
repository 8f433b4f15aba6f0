"""Computations that set ranges from others: what a schedule may say of them, and what `verify` refuses."""

from collections.abc import Callable

import pytest
import torch

from collectives.algorithms.draft import Draft
from collectives.engine import Engine
from collectives.errors import ScheduleError, UsageError
from collectives.schedule import Computes, Operands, Schedule, Step
from collectives.staging import StagingPool
from collectives.transports.alone import NoTransport
from collectives.verify import verify


def relayed(change: Callable[[Draft], None] | None = None) -> Schedule:
    """Rank 0 sends "a" on to rank 1 while it computes "b" from it; rank 1 does the same a step later."""
    draft = Draft("example", "relay", 2)
    a, b = draft.region("a", 4), draft.region("b", 4)
    draft.hold(0, "a", 4)
    draft.move(0, 0, 1, a)
    draft.compute(0, 0, "double", [b], [a])
    draft.compute(1, 1, "double", [b], [a])
    draft.want(0, "b", 4)
    draft.want(1, "b", 4)
    if change is not None:
        change(draft)
    return draft.built()


def test_what_is_sent_may_be_computed_from() -> None:
    verify(relayed())


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda draft: draft.compute(0, 1, "early", [draft.region("c", 4)], [draft.region("a", 4)]), "reads it"),
        (
            lambda draft: draft.compute(0, 1, "lost", [draft.region("c", 4)], [draft.region("d", 4)]),
            "from what is undef",
        ),
        (lambda draft: draft.compute(2, 0, "x", [draft.region("a", 4)], [draft.region("b", 4)]), ""),
        (lambda draft: draft.compute(0, 0, "x", [draft.region("a", 4)], [draft.region("a", 4)]), "sends it"),
        (
            lambda draft: draft.compute(0, 0, "x", [draft.region("b", 4)], [draft.region("a", 4)]),
            "computes on it twice",
        ),
        (lambda draft: draft.move(1, 0, 1, draft.region("a", 4)), "overwrites it"),
        (lambda draft: draft.want(1, "nowhere", 4), "is undefined at the end"),
    ],
)
def test_what_depends_on_timing_is_refused(change: Callable[[Draft], None], why: str) -> None:
    schedule = relayed(change)
    if not why:
        verify(schedule)
        return
    with pytest.raises(ScheduleError, match=why):
        verify(schedule)


def test_operands_have_a_form() -> None:
    row = [(0, 0, 0, 2, False)]
    for works in (
        Computes.of(row, [Operands(((0, 9),))]),
        Computes.of(row, [Operands(((1, 1),))]),
        Computes.of(row, [Operands((), ((2, 4),))]),
        Computes.of([(0, 0, 0, 2, True)], [Operands(((2, 4),))]),
        Computes.of(row, [Operands(), Operands()]),
    ):
        step = Step.of()
        with pytest.raises(UsageError):
            Schedule.from_steps(
                "example",
                "none",
                1,
                4,
                [Step(step.src, step.dst, step.start, step.stop, step.combine, works)],
                held=[((0, 4),)],
                wanted=[((0, 2),)],
                kernels=("k",),
            )


def test_the_engine_gives_kernels_what_they_write_and_what_they_read() -> None:
    draft = Draft("example", "alone", 1)
    a, b, c = (draft.region(name, 3) for name in "abc")
    draft.hold(0, "a", 3)
    draft.compute(0, 0, "both", [b, c], [a])
    draft.compute(1, 0, "add", [b], [b, c])
    draft.want(0, "b", 3)

    def both(first: torch.Tensor, second: torch.Tensor, source: torch.Tensor) -> None:
        first.copy_(source * 2)
        second.copy_(source + 1)

    def add(target: torch.Tensor, same: torch.Tensor, other: torch.Tensor) -> None:
        assert target.data_ptr() == same.data_ptr()
        target += other

    schedule, source = draft.built(), torch.tensor([1.0, 2.0, 3.0])
    verify(schedule)
    engine, transport = Engine(StagingPool()), NoTransport()
    program = engine.program(schedule, transport, source.dtype, source.dtype)
    staging = torch.empty(program.footprint)
    engine.run(schedule, transport, 0, source, staging, kernels={"both": both, "add": add})
    (found,) = program.pieces(source, staging)
    assert found.tolist() == [4.0, 7.0, 10.0]
    assert source.tolist() == [1.0, 2.0, 3.0]


def test_a_region_keeps_its_room() -> None:
    draft = Draft("example", "none", 1)
    assert draft.region("a", 3, room=5) == (0, 3)
    assert draft.region("a", 5) == (0, 5)
    assert draft.region("b", 2) == (64, 66)
    assert draft.region("c", 0) == (0, 0)
    with pytest.raises(UsageError, match="has 5 elements"):
        draft.region("a", 6)
