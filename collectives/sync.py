"""Bringing every member to the same bits of the shared state: `Communicator.sync` calls `sync`.

The protocol, all of it by collectives that every member takes part in, all decisions pure functions of gathered data:

1. Every member hashes its state and gathers the *ballots* (digest, may it vote, sizes). If all digests are equal, done.
2. `elect` says whose state is the one to have, and which members hold it and give.
3. The first giver broadcasts its *index*: the skeleton and the digests of all chunks. Everybody checks it against the
   elected digest.
4. Everybody gathers who holds which chunk, anywhere in its own state or already received. If nobody lacks any: 6.
5. `plan_rounds` says what moves; each round is one Schedule. Takers check a chunk by its digest before they keep it.
   Then 4 again: a chunk that came corrupt, or whose giver was lost, comes from another giver.
6. What was assembled goes into the state: the first time that anything of it is touched.

When a member is lost, the round it spoils is dropped and the survivors go on at 4 with all they have verified. An
election stands as long as one of its givers remains; after that the remaining ballots are counted anew.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from collectives import tree
from collectives.algorithms import ring
from collectives.assembly import Assembly
from collectives.election import Ballot, Election, elect
from collectives.errors import CorruptChunk, MemberLost, ProtocolError, StateDiverged
from collectives.exchange import TRIES, Exchange
from collectives.gather_bytes import Gathers, gather_bytes, gather_rows
from collectives.hashing import DIGEST_BYTES
from collectives.schedule import Schedule
from collectives.state import StateIndex, index_state, outline_tokens
from collectives.transfer import ROUND_BYTES

_NAMED_KEYS = 8
"""Keys that a message lists; the error has all of them."""


class Group(Gathers, Protocol):
    """What `sync` needs of a communicator. Its operations are in the order of one lane."""

    @property
    def member_id(self) -> int:
        """Of this process, unique for the life of the run."""

    def run(self, schedule: Schedule, tensor: Tensor, /) -> object:
        """Run a schedule on a flat buffer, in place.

        Raises:
            MemberLost: on every survivor, if a member of the schedule's world is lost; also if that happened before
                the call.

        """


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync did, in the group and on this member. `str()` of it is one line."""

    winner: str
    """Digest (hex) that the state now has on every member."""
    member: int
    members: tuple[int, ...]
    """All that have it."""
    voters: tuple[int, ...]
    givers: tuple[int, ...]
    """Voters that held the winning state."""
    healed: bool
    """Whether this member's state was another one before."""
    keys_changed: tuple[str, ...]
    """Paths at which it was, here."""
    created: tuple[str, ...]
    """Those of them with a new tensor; what else refers to the old one (a model, an optimizer) has to load it."""
    bytes_received: int
    chunks_received: int
    """Of chunks, by this member."""
    bytes_moved: int
    chunks_moved: int
    """Of chunks, by all members together; a chunk that two members took counts twice."""
    rounds: int
    """Transfers run to their end."""
    lost: tuple[int, ...]
    """Members that were lost while it ran."""
    seconds: float

    def __str__(self) -> str:
        what = f"sync to {self.winner[:12]}, {len(self.members)} members, {len(self.voters)} voters"
        lost = f", lost {list(self.lost)}" if self.lost else ""
        time_taken = f"{self.seconds:.3f} s"
        if not self.rounds and not self.healed:
            return f"{what}: nothing moved, nothing changed on member {self.member}{lost}, {time_taken}"
        moved = (
            f"{self.chunks_moved} chunks ({self.bytes_moved} bytes) from {list(self.givers)} in {self.rounds} rounds"
        )
        here = f"{self.chunks_received} chunks ({self.bytes_received} bytes) and {len(self.keys_changed)} changed keys"
        return f"{what}: {moved}, of these {here} on member {self.member}{lost}, {time_taken}"


def sync(
    comm: Group, state: dict[Any, Any], voter: bool, synced: bool, *, round_bytes: int = ROUND_BYTES
) -> SyncReport:
    """Make `state` equal, to the bit, on every member; every member calls it.

    Args:
        comm: the group.
        state: nested dict of tensors and plain values, see `collectives.tree`. It is changed in place: tensors of equal
            dtype and shape are filled (also views and leaves that require grad), others created, extra keys removed,
            lists refilled. Nobody else may touch it meanwhile.
        voter: whether this member may vote and give: it is a founder or has completed a sync.
        synced: whether this member has completed a sync.
        round_bytes: most bytes moved at once; the same on every member.

    The state is untouched until every member holds and has verified all that it lacks; if this raises before, it still
    is. Memory beyond the state: the chunks that differ here; while something moves, a few times `round_bytes` (the
    round's buffer and what the communicator stages); and a copy of one tensor at a time that is not contiguous.

    Raises:
        UsageError: the state holds something that cannot be shared; the message gives its path.
        StateDiverged: on every member: no state is held by more than half of the voters.
        StateLost: on every member: no voter is left.
        CorruptChunk: on every member: a chunk arrived with other bytes `TRIES` times. Or, from `Assembly.apply`, on
            this one.
        MemberLost, Evicted and others: from `comm`.

    """
    return _Sync(comm, state, voter, synced, round_bytes).run()


class _Sync:
    """One sync of one member."""

    def __init__(self, comm: Group, state: dict[Any, Any], voter: bool, synced: bool, round_bytes: int) -> None:
        self._started = time.perf_counter()
        self._comm = comm
        self._state = state
        self._local = index_state(state)
        index = self._local.index
        chunks = sum(map(len, index.chunks))
        self._mine = Ballot(comm.member_id, index.digest, voter, synced, len(index.skeleton), chunks)
        self._ballots: dict[int, Ballot] = {}
        self._members: tuple[int, ...] = ()
        self._loss: MemberLost | None = None
        self._assembly: Assembly | None = None
        self._index_tries = 0
        self._indexed = b""
        self._exchange = Exchange(comm.member_id, round_bytes)

    def run(self) -> SyncReport:
        """All of it; see the head of the module."""
        rows = self._gather(self._mine.to_tensor())
        everybody = self._members
        self._ballots = {member: Ballot.from_row(member, row) for member, row in zip(everybody, rows, strict=True)}
        election = self._elect()
        if any(ballot.digest != election.winner.digest for ballot in self._ballots.values()):
            while not self._everybody_holds(election):
                if set(election.givers).isdisjoint(self._members):
                    election = self._elect()
        return self._finish(election, everybody)

    def _gather(self, mine: Tensor) -> Tensor:
        """Rows of all members that are left, who are `_members` from now on."""
        rows, members = gather_rows(self._comm, mine)
        if self._loss is not None and members == self._members:
            raise self._loss  # the group did not shrink, so another try would end in the same way
        self._loss = None
        self._members = members
        return rows

    def _run(self, schedule: Schedule, buffer: Tensor) -> bool:
        """Whether it ran; if a member was lost, the next gather tells who is left."""
        try:
            self._comm.run(schedule, buffer)
        except MemberLost as loss:
            self._loss = loss
            return False
        return True

    def _elect(self) -> Election:
        """Count the ballots of those that are left."""
        while True:
            election = elect([self._ballots[member] for member in self._members])
            if election is not None:
                return election
            self._refuse_to_choose()

    def _refuse_to_choose(self) -> None:
        """Raise `StateDiverged` with the keys, on every member; return if a loss changed the ballots meanwhile."""
        ballots = [self._ballots[member] for member in self._members if self._ballots[member].voter]
        holders: dict[bytes, list[int]] = {}
        for ballot in ballots:
            holders.setdefault(ballot.digest, []).append(ballot.member)
        index = self._local.index
        speaks = any(members[0] == self._comm.member_id for members in holders.values())
        rows, members = gather_bytes(self._comm, index.outline() if speaks else b"")
        if members != self._members:
            self._members = members
            return
        spoken = {member: row for member, row in zip(members, rows, strict=True) if row}
        keys = tree.differing([outline_tokens(row, self._ballots[who].skeleton_bytes) for who, row in spoken.items()])
        shown = ", ".join(keys[:_NAMED_KEYS]) + (f" and {len(keys) - _NAMED_KEYS} more" if keys[_NAMED_KEYS:] else "")
        raise StateDiverged(
            f"members {' / '.join(map(str, holders.values()))} hold {len(holders)} different states, none held by more "
            f"than half of the {len(ballots)} voters; they differ at {shown}. Load a checkpoint on all of them, or end "
            f"members until the others agree",
            keys,
        )

    def _everybody_holds(self, election: Election) -> bool:
        """Steps 3 to 5 once; whether nobody lacks anything."""
        shared = self._indexed != election.winner.digest and self._share_index(election)
        rows = self._gather(self._status(election)).numpy()
        if not rows[:, 0].all():
            self._index_tries += shared
            if self._index_tries >= TRIES:
                unaware = [member for member, row in zip(self._members, rows, strict=True) if not row[0]]
                raise CorruptChunk(
                    f"the index of the state came to members {unaware} with other bytes, {TRIES} times; memory or "
                    f"network of a member is faulty; nothing was applied"
                )
            return False
        self._indexed = election.winner.digest
        assert self._assembly is not None, "every member knows the index"
        target = self._assembly.target
        lacking = np.unpackbits(rows[:, 1:], axis=1, count=len(target.sizes)) == 0
        self._exchange.judge(target, lacking, self._members)
        givers = [member for member in self._members if member in election.givers]
        if lacking.any() and givers:
            self._exchange.run(self._assembly, lacking, self._members, givers, self._run)
        return not lacking.any()

    def _share_index(self, election: Election) -> bool:
        """Broadcast the index of the state to have; whether that ran to its end."""
        givers = [member for member in self._members if member in election.givers]
        giver = givers[self._index_tries % len(givers)]
        length = election.winner.skeleton_bytes + DIGEST_BYTES * election.winner.chunks
        holds = self._mine.digest == election.winner.digest
        mine = bytearray(self._local.index.pack()) if holds else bytearray(length)
        buffer = torch.frombuffer(mine, dtype=torch.uint8)
        schedule = ring.broadcast(len(self._members), length, self._members.index(giver))
        if not self._run(schedule, buffer):
            return False
        index = self._local.index if holds else _checked_index(bytes(mine), election.winner)
        if index is not None:
            before, self._assembly = self._assembly, Assembly(index, self._local)
            if before is not None:
                self._assembly.take_over(before)
        return True

    def _status(self, election: Election) -> Tensor:
        """A row of uint8: whether the index is known, and a bit for each distinct chunk that is held."""
        row = np.zeros(1 + -(-election.winner.chunks // 8), dtype=np.uint8)
        if self._assembly is not None and self._assembly.target.digest == election.winner.digest:
            row[0] = 1
            held = np.packbits(np.array([self._assembly.holds(c) for c in self._assembly.target.sizes], dtype=np.bool_))
            row[1 : 1 + len(held)] = held
        return torch.from_numpy(row)

    def _finish(self, election: Election, everybody: tuple[int, ...]) -> SyncReport:
        """Apply what was assembled, and say what happened."""
        healed = self._mine.digest != election.winner.digest
        changed: tuple[str, ...] = ()
        created: tuple[str, ...] = ()
        if healed:
            assert self._assembly is not None, "nobody gets here without the index if ballots differed"
            target = self._assembly.target
            changed = tree.differing([self._local.index.tokens(), target.tokens()])
            created = tuple(tree.name(target.tree.paths[leaf]) for leaf in self._assembly.apply(self._state))
        return SyncReport(
            winner=election.winner.digest.hex(),
            member=self._comm.member_id,
            members=self._members,
            voters=election.voters,
            givers=election.givers,
            healed=healed,
            keys_changed=changed,
            created=created,
            bytes_received=self._exchange.received.size,
            chunks_received=self._exchange.received.chunks,
            bytes_moved=self._exchange.moved.size,
            chunks_moved=self._exchange.moved.chunks,
            rounds=self._exchange.rounds,
            lost=tuple(member for member in everybody if member not in self._members),
            seconds=time.perf_counter() - self._started,
        )


def _checked_index(data: bytes, winner: Ballot) -> StateIndex | None:
    """The index that was broadcast, if it is the one that the winner voted for."""
    try:
        index = StateIndex.unpack(data, winner.skeleton_bytes)
    except ProtocolError:
        return None
    return index if index.digest == winner.digest else None
