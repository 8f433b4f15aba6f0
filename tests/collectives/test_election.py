"""Elections: only voters count, and every rule is the one that is written."""

from itertools import product

import pytest
import torch

from collectives.election import MAX_CHUNKS, Ballot, elect
from collectives.errors import ProtocolError, StateLost
from collectives.tree import MAX_SKELETON

A, B = b"a" * 32, b"b" * 32


def ballot(member: int, digest: bytes, voter: bool, synced: bool) -> Ballot:
    return Ballot(member, digest, voter, synced, 10, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_small_electorate(count: int) -> None:
    kinds = [(A, True, True), (B, True, True), (A, True, False), (B, True, False), (A, False, False), (B, False, False)]
    for choice in product(kinds, repeat=count):
        ballots = [ballot(10 + i, *kind) for i, kind in enumerate(choice)]
        votes = [one.digest for one in ballots if one.voter]
        if not votes:
            with pytest.raises(StateLost):
                elect(ballots)
            continue
        expected: bytes | None = votes[0]
        if any(one.synced for one in ballots):
            expected = next((digest for digest in (A, B) if votes.count(digest) > len(votes) / 2), None)
        election = elect(ballots)
        assert (election and election.winner.digest) == expected
        if election is not None:
            assert election.voters == tuple(one.member for one in ballots if one.voter)
            assert election.givers == tuple(one.member for one in ballots if one.voter and one.digest == expected)
            assert election.winner.member == election.givers[0]


def test_a_ballot_comes_back_from_its_row() -> None:
    one = Ballot(7, A, True, False, MAX_SKELETON, MAX_CHUNKS)
    row = one.to_tensor()
    assert row.dtype is torch.uint8
    assert Ballot.from_row(7, row) == one
    assert len({len(ballot(1, B, *flags).to_tensor()) for flags in product([True, False], repeat=2)}) == 1


@pytest.mark.parametrize(("skeleton", "chunks"), [(0, 1), (-1, 1), (MAX_SKELETON + 1, 1), (1, -1), (1, MAX_CHUNKS + 1)])
def test_a_ballot_of_a_state_that_cannot_be_is_refused(skeleton: int, chunks: int) -> None:
    with pytest.raises(ProtocolError, match="member 7 announces"):
        Ballot.from_row(7, Ballot(7, A, True, True, skeleton, chunks).to_tensor())
