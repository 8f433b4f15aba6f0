"""A rank that is taken for dead while it saves, and wakes when the others have published: what it wrote is theirs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.crew import Crew
from checkpoint.loading import load_state
from checkpoint.saving import SaveOptions, SaveReport, Saving
from checkpoint.store import Store
from collectives.errors import Evicted, RingholdError
from tests.checkpoint.crews import crewed

OPENING, CONFIRM, PUBLISH = 1, 2, 3
"""The gathers of a save."""


class Departing:
    """A rank that gives what it has to a gather, and is out of the run before it hears the others."""

    def __init__(self, crew: Crew, gather: int) -> None:
        self._crew, self._left = crew, gather
        self.rank, self.size, self.trade, self.close = crew.rank, crew.size, crew.trade, crew.close

    def gather(self, data: bytes) -> dict[int, bytes]:
        heard = self._crew.gather(data)
        self._left -= 1
        if not self._left:
            raise Evicted("this member was taken for dead; join again")
        return heard


@pytest.mark.parametrize("gather", [CONFIRM, PUBLISH])
def test_the_packs_of_a_rank_that_is_evicted_stay_where_the_others_count_on_them(tmp_path: Path, gather: int) -> None:
    state = {f"tensor {number}": torch.full((70_000,), number) for number in range(6)}

    def save(crew: Crew) -> SaveReport:
        acting: Crew = Departing(crew, gather) if crew.rank == 1 else crew
        with Store(tmp_path) as store:
            return Saving(store, acting, SaveOptions()).run(state, None, 5, {})

    ends: list[SaveReport | RingholdError] = []
    if gather == PUBLISH:
        ends = crewed(2, save)
    else:  # rank 0 goes through the last gather without it
        ends = crewed(2, lambda crew: save(Alone(crew, PUBLISH) if crew.rank == 0 else crew))
    assert isinstance(ends[0], SaveReport), ends
    assert isinstance(ends[1], Evicted), ends
    loaded: dict[str, Tensor] = load_state(tmp_path, step=5)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


class Alone:
    """A rank that is the only one left as of a gather."""

    def __init__(self, crew: Crew, since: int) -> None:
        self._crew, self._since, self._count = crew, since, 0
        self.rank, self.size, self.trade, self.close = crew.rank, crew.size, crew.trade, crew.close

    def gather(self, data: bytes) -> dict[int, bytes]:
        self._count += 1
        return {self.rank: data} if self._count >= self._since else self._crew.gather(data)


@pytest.mark.parametrize("step", [None, 9])
def test_a_first_rank_that_is_lost_before_it_says_a_word_is_missed_by_nobody(tmp_path: Path, step: int | None) -> None:
    state = {"tensor": torch.arange(10)}

    def save(crew: Crew) -> SaveReport:
        if crew.rank == 0:
            raise Evicted("this member was taken for dead; join again")
        with Store(tmp_path) as store:
            return Saving(store, Alone(crew, OPENING), SaveOptions()).run(state, None, step, {})

    assert isinstance(crewed(2, save)[1], SaveReport)
    assert torch.equal(load_state(tmp_path, step=step or 0)["tensor"], state["tensor"])
