"""Every rule of the recovery protocol, taken out, is noticed: by the simulation of its state machines, or by a test of
the module that keeps it."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest

from collectives import choice, in_flight
from collectives.election import Ballot, Election, elect
from collectives.step import Step
from collectives.transports.remote import RemoteMemory
from tests.collectives import test_choice, test_election, test_in_flight, test_mailbox, test_step
from tests.membership.mutants import MUTANTS

SIMULATED = {
    "R1": ("operations are skipped", "a lane does not count what ended by an error"),
    "R2": ("staged is taken for complete", "complete without confirmations", "complete() ignores the fence"),
    "R3": (
        "Prepare is sent before it is on disk",
        "frontier: what anybody staged",
        "numbers are used again after a restart",
    ),
    "R4": ("who is out goes on",),
    "R5": ("views move under a caller",),
    "R6": ("what a survivor has left has no verdict", "a sub-group's operations run among all"),
    "R9": ("differences have no verdict", "disputes about a sub-group are not settled"),
    "R11": ("failed links are not reported", "a link may fail for ever", "nobody is ever absent"),
    "R12": ("an old journal is gone on with", "evicted when all are silent", "no quorum"),
    "R13": ("one member at a safe point is enough", "the last one is told before it is on disk"),
}
"""Rules of the state machines: some of the mutants that `tests/membership/test_simulation.py` must notice."""

_read = RemoteMemory.read
_choose = choice.choose


def _read_whatever_is_there(self: RemoteMemory, address: int, into: int, count: int) -> bool:
    _read(self, address, into, count)
    return True


def _crowds_vote(ballots: Sequence[Ballot]) -> Election | None:
    return elect([ballot._replace(voter=True) for ballot in ballots])


class _ByWhatWasAsked:
    """Chooses by what this process was asked before."""

    def __init__(self) -> None:
        self._asked = 0

    def __call__(self, *case: Any) -> Any:
        self._asked += 1
        return _choose(*case) if self._asked % 7 else "another"


ELSEWHERE: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "R7: memory that another call writes": (
        in_flight._Span,
        "touches",
        lambda self, other: False,
        test_in_flight.test_what_one_writes_no_other_touches,
    ),
    "R8: a choice by what was asked before": (
        choice,
        "choose",
        _ByWhatWasAsked(),
        test_choice.test_the_choice_is_another_processes_choice,
    ),
    "R10: the owner's word is not looked at": (
        RemoteMemory,
        "read",
        _read_whatever_is_there,
        test_mailbox.test_other_memory_is_read_as_long_as_its_owner_means_it,
    ),
    "R14: newcomers vote": (
        test_election,
        "elect",
        _crowds_vote,
        lambda: test_election.test_every_small_electorate(2),
    ),
    "R15: a loss inside of a step is forgotten": (
        Step,
        "saw",
        lambda self, end, group: None,
        test_step.test_a_loss_seen_anywhere_in_it_is_a_loss,
    ),
}
"""The others: whose attribute is replaced by what, and the test that must fail then."""


def test_every_rule_is_taken_out_somewhere() -> None:
    rules = set(SIMULATED) | {name.partition(":")[0] for name in ELSEWHERE}
    assert rules == {f"R{number}" for number in range(1, 16)}
    assert {name for names in SIMULATED.values() for name in names} <= set(MUTANTS)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_rule_that_is_taken_out_is_noticed(name: str) -> None:
    target, attribute, broken, test = ELSEWHERE[name]
    with patch.object(target, attribute, broken), pytest.raises((AssertionError, pytest.fail.Exception)):
        test()
