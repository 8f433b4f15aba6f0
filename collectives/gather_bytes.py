"""Byte strings of any length from every member to every member, by two all-gathers.

For the rooms that exchange small descriptions before they move data: `collectives.sync`, layouts, checkpoint manifests.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from collectives.errors import UsageError

LIMIT = 1 << 30
"""Most bytes that one member may give."""


class Gathered(Protocol):
    """What an all-gather hands back; `collectives.communicator.Outcome` is one."""

    @property
    def result(self) -> Tensor | None:
        """Shape (contributors, *shape of the input)."""

    @property
    def contributors(self) -> tuple[int, ...]:
        """Member ids, one a row of `result`."""


class Gathers(Protocol):
    """A group whose members can all-gather; `collectives.communicator.Communicator` is one."""

    def all_gather(self, tensor: Tensor, /) -> Gathered:
        """Rows of the contributors; survivors only, if a member is lost."""


class Rows(NamedTuple):
    """The byte strings, and whose they are: `rows[i]` is that of member `members[i]`."""

    rows: tuple[bytes, ...]
    members: tuple[int, ...]


def gather_bytes(group: Gathers, data: bytes) -> Rows:
    """Give `data` to every member and take theirs. Every member calls it; all get the same rows.

    A member that is lost on the way is left out, in the rows and in the members alike. Every member receives as many
    bytes from each other as the longest string has.

    Raises:
        UsageError: on every member alike, if a string is longer than `LIMIT`.

    """
    lengths, everybody = gather_rows(group, torch.tensor([len(data)], dtype=torch.int64))
    by_member = dict(zip(everybody, (int(length) for length in lengths), strict=True))
    longest = max(by_member.values())
    if longest > LIMIT:
        owners = [member for member, length in by_member.items() if length > LIMIT]
        raise UsageError(f"members {owners} give more than {LIMIT} bytes to be gathered; move bulk data as tensors")
    if longest == 0:
        return Rows((b"",) * len(everybody), everybody)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    rows, members = gather_rows(group, padded)
    return Rows(
        tuple(row.numpy()[: by_member[member]].tobytes() for row, member in zip(rows, members, strict=True)), members
    )


def gather_rows(group: Gathers, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """An all-gather's rows and whose they are."""
    outcome = group.all_gather(tensor)
    assert outcome.result is not None, "an all-gather has a result"
    return outcome.result, outcome.contributors
