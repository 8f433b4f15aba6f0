"""Whose state wins: the ballots of all members, and what follows from them.

A pure function of gathered data, so that every member comes to the same result; `collectives.sync` calls it. Only
*voters*, the founders of a run and members that have once completed a sync, vote and give: a crowd of newcomers that
start from the same seed can never outvote a survivor's training.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from collectives.errors import ProtocolError, StateLost
from collectives.hashing import DIGEST_BYTES
from collectives.tree import MAX_SKELETON

MAX_CHUNKS = 1 << 25
"""Most chunks of a state; 32 TiB of large tensors, an index of 1 GiB."""
_NUMBERS = 4


class Ballot(NamedTuple):
    """What a member says of itself and its state."""

    member: int
    digest: bytes
    """Of its state."""
    voter: bool
    synced: bool
    """Whether it has completed a sync."""
    skeleton_bytes: int
    chunks: int
    """Length of the packed skeleton, and number of chunks of all tensors."""

    def to_tensor(self) -> Tensor:
        """As uint8, of one length for all members; the member id is not in it."""
        numbers = np.array([self.voter, self.synced, self.skeleton_bytes, self.chunks], dtype="<i8")
        return torch.frombuffer(bytearray(self.digest + numbers.tobytes()), dtype=torch.uint8)

    @classmethod
    def from_row(cls, member: int, row: Tensor) -> Self:
        """Read a row of gathered ballots.

        Raises:
            ProtocolError: it speaks of a state that cannot be.

        """
        data = row.numpy().tobytes()
        voter, synced, skeleton_bytes, chunks = np.frombuffer(data[DIGEST_BYTES:], dtype="<i8", count=_NUMBERS).tolist()
        if not (0 < skeleton_bytes <= MAX_SKELETON and 0 <= chunks <= MAX_CHUNKS):
            raise ProtocolError(
                f"member {member} announces a state of {skeleton_bytes} bytes of skeleton and {chunks} chunks; the "
                f"limits are {MAX_SKELETON} and {MAX_CHUNKS}"
            )
        return cls(member, data[:DIGEST_BYTES], bool(voter), bool(synced), skeleton_bytes, chunks)


class Election(NamedTuple):
    """A result: the ballot of the first giver, whose digest is the one to have; all givers, and all who voted."""

    winner: Ballot
    givers: tuple[int, ...]
    voters: tuple[int, ...]


def elect(ballots: Sequence[Ballot]) -> Election | None:
    """Decide from the ballots of all members, in the order of ranks. None: the voters have no majority.

    If no member has ever completed a sync this is the first one, and the founder of the lowest rank wins. Else the
    state wins that more than half of the voters hold.

    Raises:
        StateLost: nobody may vote.

    """
    voters = [ballot for ballot in ballots if ballot.voter]
    if not voters:
        raise StateLost(
            f"none of the members {[ballot.member for ballot in ballots]} is a founder or has completed a sync, so the "
            f"run's state is lost with the members that had it; start a new run from a checkpoint"
        )
    if any(ballot.synced for ballot in ballots):
        digest, votes = Counter(ballot.digest for ballot in voters).most_common(1)[0]
        if 2 * votes <= len(voters):
            return None
    else:
        digest = voters[0].digest
    givers = [ballot for ballot in voters if ballot.digest == digest]
    return Election(givers[0], tuple(giver.member for giver in givers), tuple(voter.member for voter in voters))
