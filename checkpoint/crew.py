"""The ranks that save or load together, by the numbers that they had when it began, whatever becomes of them.

`checkpoint.saving` and `checkpoint.loading` speak to a `Crew`: a communicator, a sub-group of it for what goes on in
the background, or one process alone. Layouts name ranks of the communicator; a rank that dies keeps its number here.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from checkpoint.codec import Bytes
from collectives import errors
from collectives.communicator import Communicator
from collectives.errors import RingholdError
from collectives.gather_bytes import gather_bytes
from collectives.membership.claims import digest_of
from collectives.outcome import Outcome
from collectives.subgroup import SubGroup


class Crew(Protocol):
    """Ranks that work together. Every rank calls the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """How many there were when it began."""

    def gather(self, data: bytes) -> dict[int, bytes]:
        """What each rank gave, by rank; a rank that was lost is left out, on all alike."""

    def trade(self, parcels: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Send bytes to other ranks and get what they send; each hears from whom it gets something.

        Raises:
            MemberLost: on every rank that is left, if one was lost.

        """

    def close(self) -> None:
        """The work is done."""


class Single:
    """A crew of one."""

    rank, size = 0, 1

    def gather(self, data: bytes) -> dict[int, bytes]:
        """One's own."""
        return {0: data}

    def trade(self, parcels: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Nobody is there to trade with."""
        assert not parcels, "there is no other rank"
        return {}

    def close(self) -> None:
        """Nothing to close."""


class Team:
    """The members of a communicator.

    Args:
        comm: the communicator; its members now.
        background: empty: in the communicator's main lane, so that its rank and size follow losses, as after any
            other call. Else the name of a sub-group, whose lane does not meet the caller's.

    """

    def __init__(self, comm: Communicator, background: str) -> None:
        members = comm.members
        self._members = members
        self._group: Communicator | SubGroup = comm
        if background:
            self._group = comm.group(members, f"{background} {digest_of(members):016x}")
        self._numbers = {member: number for number, member in enumerate(members)}
        self.rank, self.size = comm.rank, len(members)

    def gather(self, data: bytes) -> dict[int, bytes]:
        """By two all-gathers, which run again without who is lost."""
        rows, members = gather_bytes(self._group, data)
        return {self._numbers[member]: row for member, row in zip(members, rows, strict=True)}

    def trade(self, parcels: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """By one all-to-all."""
        members = self._group.members
        ranks = [self._numbers[member] for member in members]
        counts = [len(parcels.get(rank, ())) for rank in ranks]
        joined = np.concatenate([parcels.get(rank, np.empty(0, np.uint8)) for rank in ranks])
        outcome = self._group.all_to_all_v(torch.from_numpy(joined), counts)
        return self._parts(outcome)

    def close(self) -> None:
        """The sub-group stays for the next time: the same members have the same lane."""

    def _parts(self, outcome: Outcome) -> dict[int, Bytes]:
        data: Bytes = _whole(outcome.result).numpy()
        ends = np.cumsum(outcome.counts)
        return {
            self._numbers[member]: data[end - count : end]
            for member, count, end in zip(outcome.contributors, outcome.counts, ends.tolist(), strict=True)
        }


def _whole(result: Tensor | None) -> Tensor:
    assert result is not None, "an all-to-all has a result"
    return result


def tell(error: RingholdError | None) -> str:
    """An error as a rank tells it to the others; empty if there is none."""
    return "" if error is None else f"{type(error).__name__}: {error}"


def raise_told(mine: RingholdError | None, told: Mapping[int, str], doing: str) -> None:
    """Raise this rank's own error, else the first that another rank told, of the same class."""
    if mine is not None:
        raise mine
    for rank, text in told.items():
        if text:
            name, _, message = text.partition(": ")
            kind = getattr(errors, name, RingholdError)
            raise kind(f"rank {rank} cannot {doing}: {message}")


def crew_of(comm: Communicator | None, background: str = "") -> Crew:
    """The crew of a communicator; None or one of one member: this process alone."""
    return Single() if comm is None or comm.size == 1 else Team(comm, background)
