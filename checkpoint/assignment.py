"""Who writes which chunk, and who sends what to whom for it. A pure function of what all ranks hold, equal on all.

A chunk is written by the rank that has most of it; where several have as much, which is the case for replicas, by the
one with the fewest bytes to write so far. What it lacks it gets from the other ranks. `checkpoint.saving` runs it, and
asks again without a rank that was lost: what was written stays written.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from checkpoint.dtypes import ITEMSIZE
from checkpoint.grid import Grid
from checkpoint.holdings import Group, Whole
from collectives.region import Region


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a chunk and where its bytes come from: `sources[i]` gives the i-th term of the group's reduction."""

    box: Region
    group: Group
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A chunk to be written by `owner` from `parts`, which do not overlap and fill its box."""

    key: str
    index: int
    """Number of the chunk in the tensor's grid."""
    box: Region
    dtype: str
    owner: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Raw bytes of the chunk."""
        return self.box.size * ITEMSIZE[self.dtype]

    @property
    def local(self) -> bool:
        """Whether the owner has all of it."""
        return all(source == self.owner for part in self.parts for source in part.sources)

    def parcels(self) -> Iterator[tuple[int, Part, int]]:
        """What is sent to the owner: from whom, of which part, in the fixed order; bytes."""
        for part in self.parts:
            for source in part.sources:
                if source != self.owner:
                    yield source, part, part.box.size * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The jobs, and the tensors of which something is held by no rank that is left."""

    jobs: tuple[Job, ...]
    lost: tuple[str, ...]


def assign(
    wholes: Mapping[str, Whole], grids: Mapping[str, Grid], alive: Collection[int], done: Collection[tuple[str, int]]
) -> Assignment:
    """Give every chunk that is not `done` to a rank that is alive."""
    load: dict[int, int] = dict.fromkeys(sorted(alive), 0)
    sends: dict[int, int] = defaultdict(int)
    jobs: list[Job] = []
    lost: dict[str, None] = {}
    for key, whole in wholes.items():
        groups = [_Living(group, load) for group in whole.groups]
        pieces: dict[int, list[tuple[Region, _Living]]] = defaultdict(list)
        grid = grids[key]
        for living in groups:
            for box, _ in living.group.shard.boxes():
                for index in grid.touching(box):
                    pieces[index].append((grid.box(index).intersect(box), living))
        for index in sorted(pieces):
            if (key, index) in done:
                continue
            if any(not all(living.terms) for _, living in pieces[index]):
                lost[key] = None
                continue
            owner = _owner(pieces[index], load)
            parts = tuple(
                Part(box, living.group, tuple(_source(term, owner, sends) for term in living.terms))
                for box, living in pieces[index]
            )
            job = Job(key, index, grid.box(index), whole.dtype, owner, parts)
            load[owner] += job.nbytes
            for source, _, nbytes in job.parcels():
                sends[source] += nbytes
            jobs.append(job)
    return Assignment(tuple(jobs), tuple(lost))


class _Living:
    """A group without the ranks that were lost."""

    __slots__ = ("group", "terms")

    def __init__(self, group: Group, alive: Collection[int]) -> None:
        self.group = group
        self.terms = tuple(tuple(rank for rank in term if rank in alive) for term in group.terms)


def _owner(pieces: list[tuple[Region, _Living]], load: Mapping[int, int]) -> int:
    """Who has most of a chunk; of several the one with the least to write, then the first."""
    if len(pieces) == 1:
        candidates = {rank for term in pieces[0][1].terms for rank in term}
    else:
        shares: dict[int, int] = defaultdict(int)
        for box, living in pieces:
            for term in living.terms:
                for rank in term:
                    shares[rank] += box.size
        most = max(shares.values())
        candidates = {rank for rank, share in shares.items() if share == most}
    return min(candidates, key=lambda rank: (load[rank], rank))


def _source(term: tuple[int, ...], owner: int, sends: Mapping[int, int]) -> int:
    """Who gives a term: the owner itself if it has it, else the one that sends the least so far."""
    return owner if owner in term else min(term, key=lambda rank: (sends.get(rank, 0), rank))
