"""The chunks that a sync moves: runs the rounds of a plan, verifies what arrives, and remembers what came corrupt.

`collectives.sync` has one `Exchange` for each sync of a member. All that it decides follows from gathered data and
from which rounds ran, so it decides the same on every member.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collectives import tree
from collectives.assembly import Assembly
from collectives.errors import CorruptChunk
from collectives.hashing import digests
from collectives.schedule import Schedule
from collectives.state import StateIndex
from collectives.transfer import Round, plan_rounds

TRIES = 3
"""How often a chunk may arrive with other bytes before everybody gives up."""


@dataclass(slots=True)
class Volume:
    """What was moved."""

    chunks: int = 0
    size: int = 0
    """In bytes."""

    def add(self, chunks: int, size: int) -> None:
        """Count some more."""
        self.chunks += chunks
        self.size += size


class Exchange:
    """The transfers of one sync, seen from one member.

    Attributes:
        received: what arrived at this member.
        moved: what arrived at all members together; a chunk that two members took counts twice.
        rounds: transfers that ran to their end.

    """

    def __init__(self, member: int, round_bytes: int) -> None:
        self.received = Volume()
        self.moved = Volume()
        self.rounds = 0
        self._member = member
        self._round_bytes = round_bytes
        self._given: dict[bytes, int] = {}
        self._failures: Counter[tuple[int, bytes]] = Counter()

    def judge(self, target: StateIndex, lacking: npt.NDArray[np.bool_], members: Sequence[int]) -> None:
        """Note which chunks somebody still lacks although they were moved since the last call.

        `lacking` has shape (members, distinct chunks): whether the member lacks the chunk of `target.sizes`.

        Raises:
            CorruptChunk: one of them for the last time; on every member.

        """
        chunks = list(target.sizes)
        for number in np.flatnonzero(lacking.any(axis=0)).tolist():
            chunk = chunks[number]
            if chunk not in self._given:
                continue
            self._failures[self._given[chunk], chunk] += 1
            givers = sorted({giver for giver, failed in self._failures if failed == chunk})
            if sum(self._failures[giver, chunk] for giver in givers) >= TRIES:
                takers = [members[row] for row in np.flatnonzero(lacking[:, number]).tolist()]
                raise CorruptChunk(
                    f"chunk {chunk.hex()[:12]} of {_where(target, chunk)} came to members {takers} with other bytes, "
                    f"{TRIES} times, from members {givers}. Either the state is changed while it is synchronized, or "
                    f"memory or network of one of these is faulty; nothing was applied"
                )
        self._given.clear()

    def run(
        self,
        assembly: Assembly,
        lacking: npt.NDArray[np.bool_],
        members: Sequence[int],
        givers: Sequence[int],
        run: Callable[[Schedule, Tensor], bool],
    ) -> None:
        """Move all that is lacking, round by round, until `run` says that a member was lost.

        What arrives and has its digest is kept in the assembly; what has not, is lacking still.
        """
        chunks = list(assembly.target.sizes)
        rank_of = {member: rank for rank, member in enumerate(members)}
        number_of = {chunk: number for number, chunk in enumerate(chunks)}
        failures = {
            (rank_of[giver], number_of[chunk]): count
            for (giver, chunk), count in self._failures.items()
            if giver in rank_of and chunk in number_of
        }
        sizes = list(assembly.target.sizes.values())
        ranks = [rank_of[giver] for giver in givers]
        memory = torch.empty(0, dtype=torch.uint8)
        for one in plan_rounds(sizes, lacking, ranks, failures, self._round_bytes):
            if len(memory) < one.count:
                memory = torch.empty(one.count, dtype=torch.uint8)
            buffer = memory[: one.count]
            self._lay_out(one, rank_of[self._member], chunks, assembly, buffer.numpy())
            if not run(one.schedule(len(members)), buffer):
                return  # and leave the buffer to whatever of the abandoned attempt still reads it
            self._accept(one, rank_of[self._member], chunks, assembly, buffer.numpy())
            self._count(one, rank_of[self._member])
            self._given.update(
                (chunks[number], members[route.giver]) for route in one.routes for number in route.chunks
            )

    def _lay_out(
        self, one: Round, rank: int, chunks: Sequence[bytes], assembly: Assembly, buffer: npt.NDArray[np.uint8]
    ) -> None:
        """Fill in what this member gives."""
        for route in one.routes:
            if route.giver == rank:
                for chunk, place in _places(route.chunks, route.start, chunks, assembly.target):
                    buffer[place] = assembly.content(chunk)

    def _accept(
        self, one: Round, rank: int, chunks: Sequence[bytes], assembly: Assembly, buffer: npt.NDArray[np.uint8]
    ) -> None:
        """Keep what this member was given and has the digest that it should have."""
        for route in one.routes:
            if rank in route.takers:
                places = _places(route.chunks, route.start, chunks, assembly.target)
                found = digests([buffer[place] for _, place in places])
                for (chunk, place), actual in zip(places, found, strict=True):
                    if actual == chunk:
                        assembly.put(chunk, buffer[place])

    def _count(self, one: Round, rank: int) -> None:
        self.rounds += 1
        for route in one.routes:
            size, takers = route.stop - route.start, len(route.takers)
            self.moved.add(takers * len(route.chunks), takers * size)
            if rank in route.takers:
                self.received.add(len(route.chunks), size)


def _places(
    numbers: Sequence[int], start: int, chunks: Sequence[bytes], target: StateIndex
) -> list[tuple[bytes, slice]]:
    """Chunks of a route and where in the buffer each of them lies."""
    places: list[tuple[bytes, slice]] = []
    for number in numbers:
        stop = start + target.sizes[chunks[number]]
        places.append((chunks[number], slice(start, stop)))
        start = stop
    return places


def _where(target: StateIndex, chunk: bytes) -> str:
    """The keys of the tensors that have this chunk."""
    keys = [tree.name(path) for path, several in zip(target.tree.paths, target.chunks, strict=True) if chunk in several]
    return repr(keys[0]) if len(keys) == 1 else f"{keys[0]!r} and {len(keys) - 1} more"
