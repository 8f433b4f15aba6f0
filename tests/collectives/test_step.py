"""What makes a step count (rule R15), without processes; `tests/conformance/test_r14_r15_steps.py` has them."""

from typing import Any

import pytest
from torch import Tensor

from collectives.errors import MemberLost
from collectives.outcome import Outcome
from collectives.step import Step


class Alone:
    """A communicator of three members, of which the others saw no loss."""

    def __init__(self, lost_elsewhere: bool = False) -> None:
        self.members = (1, 2, 3)
        self.resumed = 0
        self._lost_elsewhere = lost_elsewhere

    def resume_all(self) -> None:
        self.resumed += 1

    def all_reduce(self, flag: Tensor, op: str) -> None:
        assert op == "max"
        flag.fill_(max(int(flag.item()), self._lost_elsewhere))


def step_of(comm: Alone, *ends: Any, group: tuple[int, ...] = ()) -> Step:
    """A step in which operations end so."""
    with Step(comm) as step:  # type: ignore[arg-type]
        for end in ends:
            step.saw(end, group)
    return step


def outcome(*contributors: int) -> Outcome:
    return Outcome(None, contributors, 1, 1, False)


def test_a_step_counts_if_nobody_saw_a_loss() -> None:
    assert step_of(Alone(), outcome(1, 2, 3)).committed
    assert step_of(Alone(), outcome(1, 3), group=(1, 3)).committed
    assert not step_of(Alone(lost_elsewhere=True), outcome(1, 2, 3)).committed


def test_a_loss_seen_anywhere_in_it_is_a_loss() -> None:
    for end in (outcome(1, 3), MemberLost("lost", (2,), (1, 3))):
        comm = Alone()
        assert not step_of(comm, outcome(1, 2, 3), end, outcome(1, 2, 3)).committed
        assert comm.resumed == 1


def test_a_loss_is_not_raised_further_and_another_error_is() -> None:
    comm = Alone()
    with Step(comm) as step:  # type: ignore[arg-type]
        raise MemberLost("lost", (2,), (1, 3))
    assert not step.committed
    with pytest.raises(ValueError, match="mine"), Step(comm) as step:  # type: ignore[arg-type]
        raise ValueError("mine")
    assert not step.committed
