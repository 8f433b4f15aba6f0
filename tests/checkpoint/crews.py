"""Ranks of a save or load as threads of one process: no network, so that many cases run in little time.

Processes, signals and losses are for `test_crash.py`; here is what every rank computes.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from checkpoint.codec import Bytes
from checkpoint.crew import Crew, Single
from checkpoint.loading import Loading, LoadOptions, LoadReport
from checkpoint.peers import Offer
from checkpoint.saving import SaveOptions, SaveReport, Saving
from checkpoint.store import Store
from collectives.errors import RingholdError

T = TypeVar("T")
PATIENCE = 60.0


class ThreadCrew:
    """One rank of several that share a meeting."""

    def __init__(self, rank: int, size: int, meeting: "Meeting") -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def gather(self, data: bytes) -> dict[int, bytes]:
        return dict(enumerate(self._meeting.exchange(self.rank, data)))

    def trade(self, parcels: Mapping[int, Bytes]) -> dict[int, Bytes]:
        everybody: list[dict[int, Bytes]] = self._meeting.exchange(self.rank, {k: v.copy() for k, v in parcels.items()})
        return {rank: sent.get(self.rank, np.empty(0, np.uint8)) for rank, sent in enumerate(everybody)}

    def close(self) -> None:
        return


class Meeting:
    """Where threads give something and get what all gave."""

    def __init__(self, size: int) -> None:
        self._given: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=PATIENCE)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait()
        seen = list(self._given)
        self._barrier.wait()
        return seen


def crewed(size: int, work: Callable[[Crew], T]) -> list[T | RingholdError]:
    """What each rank's work returned, or the error that it ended with."""
    meeting = Meeting(size)

    def one(rank: int) -> T | RingholdError:
        try:
            return work(Single() if size == 1 else ThreadCrew(rank, size, meeting))
        except RingholdError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def saved(url: str, states: list[Any], layouts: Any, step: int = 0, **options: Any) -> list[SaveReport | RingholdError]:
    """Save `states[rank]` of every rank; `layouts` may be a list with one for each rank."""

    def work(crew: Crew) -> SaveReport:
        mine = layouts[crew.rank] if isinstance(layouts, list) else layouts
        with Store(url) as store:
            return Saving(store, crew, SaveOptions(**options)).run(states[crew.rank], mine, step, {})

    return crewed(len(states), work)


def loaded(
    url: str, states: list[Any], layouts: Any, offers: list[Offer | None] | None = None, **options: Any
) -> list[LoadReport | RingholdError]:
    """Fill `states[rank]` of every rank, from what ranks offer and from files."""

    def work(crew: Crew) -> LoadReport:
        mine = layouts[crew.rank] if isinstance(layouts, list) else layouts
        offer = None if offers is None else offers[crew.rank]
        loading = Loading(url, crew, LoadOptions(**options))
        return loading.run(states[crew.rank], mine, None, peers=offers is not None, offer=offer)

    return crewed(len(states), work)
