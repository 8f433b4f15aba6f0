"""From a problem of attention to the schedule that solves it: what each scheme sends, computes and keeps where.

Called by `api` (to run it), `choice` and `ringhold attention` (to time it), and by the tests (to verify it). One
schedule for each direction; `Layout.tasks` say what its kernels do.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from collectives.algorithms.attention_grid import Grid, both_ways, shortest
from collectives.algorithms.attention_heads import exchange, give_back
from collectives.algorithms.attention_relay import relay
from collectives.algorithms.attention_tree import tree
from collectives.algorithms.draft import Draft
from collectives.algorithms.sequence import Piece, Side, Task, TreeSizes
from collectives.errors import UsageError
from collectives.region import split
from collectives.schedule import Schedule
from parallel.attention.local import partial_dtype
from parallel.attention.shares import Run, Share, tiles

SCHEMES = ("ring", "bidirectional", "token_ring", "token_ring_relay", "hybrid", "ulysses", "usp", "tree")
"""In `tree` every rank has all queries; in the others each has its rows of both."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be computed, by whom. All ranks build the same one.

    Attributes:
        batch, heads, kv_heads, head_dim, dtype: of the tensors; `kv_heads` divides `heads`.
        queries, keys: what each rank has of the two sequences.
        causal: row `i` of the queries sees the keys up to row `i`.
        scale: of the scores.
        scheme: one of SCHEMES.
        columns: ranks of a node (hybrid), or ranks that share the heads (usp); ignored by others.
        parts: into how many pieces a rank's rows are cut, to overlap what is sent with what is computed.

    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    queries: tuple[Share, ...]
    keys: tuple[Share, ...]
    causal: bool
    scale: float
    scheme: str
    columns: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UsageError(f"scheme must be auto or one of {', '.join(SCHEMES)}, not {self.scheme!r}")
        if self.heads % self.kv_heads:
            raise UsageError(f"{self.kv_heads} key heads do not divide {self.heads} query heads")
        if self.parts < 1:
            raise UsageError(f"parts must be 1 or more, not {self.parts}")
        if self.scheme in ("hybrid", "usp") and (self.columns < 1 or self.world % self.columns):
            raise UsageError(f"{self.scheme}: {self.columns} columns do not divide {self.world} ranks")

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return len(self.keys)

    @property
    def title(self) -> str:
        """What all members must agree on, in words; they compare it, so that an error can tell who differs in what."""
        dtype, mask = str(self.dtype).removeprefix("torch."), ", causal" if self.causal else ""
        sizes = f"{self.batch} x {self.heads} heads ({self.kv_heads} of keys) of {self.head_dim}"
        return f"{self.scheme} of {sizes}, {dtype}{mask}, scale {self.scale:.6g}"

    @property
    def head_ranks(self) -> int:
        """How many ranks share the heads."""
        return {"ulysses": self.world, "usp": self.columns}.get(self.scheme, 1)


class Field(NamedTuple):
    """Tensors in a region: `copies` of (batch, heads, rows, width) of `dtype`."""

    copies: int
    heads: int
    width: int
    dtype: torch.dtype


class Heads(NamedTuple):
    """The heads that a rank computes with: ranges of those of queries and of keys."""

    q: tuple[int, int]
    kv: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """How many of each."""
        return self.q[1] - self.q[0], self.kv[1] - self.kv[0]


class Segment(NamedTuple):
    """Rows of a rank's own, as part of what its group puts together: `[start, stop)` of `rank`, at `at`."""

    rank: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """A schedule with what is needed to run it.

    Attributes:
        tasks: what the kernels do, by name.
        held, wanted: by rank, the keys of the regions that it gives and gets, in the order of their elements; tokens,
            but for heads that are exchanged and the result of a tree.
        queries, keys: by rank, the rows that pieces count (of its group, where heads are shared).
        pieces: by side and rank, what these are cut into.
        segments: by rank, where these rows come from, for queries and keys.

    """

    problem: Problem
    backward: bool
    schedule: Schedule
    tasks: dict[str, Task]
    held: tuple[tuple[Hashable, ...], ...]
    wanted: tuple[tuple[Hashable, ...], ...]
    queries: tuple[Share, ...]
    keys: tuple[Share, ...]
    pieces: dict[str, dict[int, tuple[Piece, ...]]]
    segments: tuple[tuple[tuple[Segment, ...], tuple[Segment, ...]], ...]


def heads_of(problem: Problem, rank: int) -> Heads:
    """The heads that a rank computes with. Keys that queries of two ranks need go to both."""
    start, stop = split(problem.heads, problem.head_ranks)[rank % problem.head_ranks]
    group = problem.heads // problem.kv_heads
    return Heads((start, stop), (start // group, -(-stop // group)) if start < stop else (0, 0))


def fields(problem: Problem, backward: bool, side: str, heads: Heads) -> tuple[Field, ...]:
    """What a region of a side ("q", "kv", or their results "out q", "out kv") consists of."""
    q, kv = heads.counts
    dim, dtype, partial = problem.head_dim, problem.dtype, partial_dtype(problem.dtype)
    if side == "kv":
        return (Field(2, kv, dim, dtype),)
    if side == "out kv":
        return (Field(2, kv, dim, partial),) if backward else ()
    if side == "q":  # behind it, in the backward pass: the gradient of the output, the output, the lse
        return (Field(3, q, dim, dtype), Field(1, q, 1, partial)) if backward else (Field(1, q, dim, dtype),)
    return (Field(1, q, dim, partial),) if backward else (Field(1, q, dim, partial), Field(1, q, 1, partial))


def row_bytes(problem: Problem, backward: bool, side: str, heads: Heads | None = None) -> int:
    """Bytes of a row of a side."""
    known = fields(problem, backward, side, heads or Heads((0, problem.heads), (0, problem.kv_heads)))
    return problem.batch * sum(field.copies * field.heads * field.width * field.dtype.itemsize for field in known)


@lru_cache(maxsize=64)
def layout(problem: Problem, backward: bool = False) -> Layout:
    """Lay out the schedule of a problem; remembered."""
    return _Builder(problem, backward).layout()


class _Builder:
    """Makes one layout."""

    def __init__(self, problem: Problem, backward: bool) -> None:
        self._problem, self._backward = problem, backward
        name = "attention backward" if backward else "attention"
        self._draft = Draft(name, problem.title, problem.world)
        self._tasks: dict[str, Task] = {}
        groups = [rank // problem.head_ranks for rank in range(problem.world)]
        joined = [
            [_joined(shares, range(group * problem.head_ranks, (group + 1) * problem.head_ranks)) for group in groups]
            for shares in (problem.queries, problem.keys)
        ]
        self._queries, self._keys = (tuple(share for share, _ in side) for side in joined)
        self._segments = tuple((mine[1], theirs[1]) for mine, theirs in zip(*joined, strict=True))
        self._pieces: dict[str, dict[int, tuple[Piece, ...]]] = {"q": {}, "kv": {}}
        self._met: dict[tuple[Piece, Piece], bool] = {}

    def layout(self) -> Layout:
        """Build it."""
        if self._problem.scheme == "tree":
            self._tree()
        elif self._problem.head_ranks > 1:
            self._by_heads()
        else:
            self._by_rows()
        draft = self._draft
        held, wanted = (tuple(tuple(mine) for mine in side) for side in (draft.held, draft.wanted))
        return Layout(
            self._problem,
            self._backward,
            draft.built(),
            self._tasks,
            held,
            wanted,
            self._queries,
            self._keys,
            self._pieces,
            self._segments,
        )

    def _by_rows(self) -> None:
        """Each rank has all heads of its rows."""
        problem, draft = self._problem, self._draft
        world = range(problem.world)
        q, kv = self._sides(list(world))
        for rank in world:
            for side in (q, kv):
                for number, piece in enumerate(side.pieces[rank]):
                    draft.hold(rank, (side.name, rank, number), side.token(piece, side.moved))
                    draft.want(rank, ("out " + side.name, rank, number), side.token(piece, side.result))
        if problem.scheme == "token_ring_relay":
            relay(draft, self._tasks, list(world), q, kv, self._needed)
            return
        columns = {"token_ring": problem.world, "hybrid": problem.columns}.get(problem.scheme, 1)
        ranks = [list(world[start : start + columns]) for start in range(0, problem.world, columns)]
        self._grid(0, ranks, q, kv).build()

    def _by_heads(self) -> None:
        """Groups exchange heads; those who have the same heads go round."""
        problem, draft = self._problem, self._draft
        share = problem.head_ranks
        groups = [list(range(start, start + share)) for start in range(0, problem.world, share)]
        sides = {rank: self._sides([rank]) for rank in range(problem.world)}
        for group in groups:
            parts = {side: self._parts(group, side, side) for side in ("q", "kv")}
            exchange(draft, self._tasks, group, parts, self._tokens(sides, group, result=False))
        ends = []
        for column in range(share):
            ranks = [group[column] for group in groups]
            grid = self._grid(2, [[rank] for rank in ranks], *self._sides(ranks))
            grid.build()
            ends.append(grid.end)
        for group in groups:
            names = ("q", "kv") if self._backward else ("q",)
            parts = {side: self._parts(group, side, "out " + side) for side in names}
            give_back(draft, self._tasks, max(ends) + 1, group, parts, self._tokens(sides, group, result=True))

    def _tree(self) -> None:
        problem = self._problem
        q = Piece(0, 0, problem.queries[0].rows)
        keys = [Piece(rank, 0, share.rows) for rank, share in enumerate(problem.keys)]
        moved, result, kv, kv_result = (
            row_bytes(problem, self._backward, side) for side in ("q", "out q", "kv", "out kv")
        )
        tree(self._draft, self._tasks, q, keys, TreeSizes(moved * q.rows, result * q.rows, kv, kv_result))

    def _grid(self, first: int, ranks: Sequence[Sequence[int]], q: Side, kv: Side) -> Grid:
        problem = self._problem
        short = shortest(problem.causal)
        kv_way = both_ways if problem.scheme == "bidirectional" else short
        # One is computed with while others travel. Of queries the results travel too, and behind the computation. In
        # the backward pass, where more travels and memory is at its most, fewer are on their way.
        both = problem.scheme == "bidirectional"
        lanes = ((4, 2), (4, 2) if both else (2,)) if self._backward else ((8, 4, 2), (4, 2))
        return Grid(self._draft, self._tasks, first, ranks, q, kv, self._needed, short, kv_way, lanes)

    def _sides(self, ranks: Sequence[int]) -> tuple[Side, Side]:
        """Queries and keys of ranks with equal heads."""
        problem = self._problem
        heads = heads_of(problem, ranks[0])
        sides = []
        for name, shares in (("q", self._queries), ("kv", self._keys)):
            strata = max(len(share.strata) for share in shares)
            rounds = self._parts_of(name, strata if problem.causal else 1)
            pieces = {rank: _cut(rank, shares[rank], rounds) for rank in ranks}
            moved, result = (row_bytes(problem, self._backward, side, heads) for side in (name, "out " + name))
            self._pieces[name] |= pieces
            sides.append(Side(name, pieces, moved, result))
        return sides[0], sides[1]

    def _parts_of(self, side: str, strata: int) -> int:
        """Into how many pieces a rank's rows of a side are cut: those that travel, and by strata where it pays."""
        scheme, parts = self._problem.scheme, self._problem.parts
        if scheme in ("bidirectional", "token_ring_relay"):
            parts += parts % 2
        travels = {"token_ring": "q", "token_ring_relay": "q", "hybrid": "q"}.get(scheme, "kv")
        if side == travels:
            return max(strata, -(-parts // strata) * strata)
        return strata if scheme == "hybrid" else 1

    def _parts(self, group: Sequence[int], side: str, region: str) -> dict[tuple[int, int], int]:
        """The bytes of each rank's rows with the heads of each."""
        shares = self._problem.queries if side == "q" else self._problem.keys
        sizes = {dst: row_bytes(self._problem, self._backward, region, heads_of(self._problem, dst)) for dst in group}
        return {(src, dst): shares[src].rows * size for src in group for dst, size in sizes.items()}

    def _tokens(
        self, sides: dict[int, tuple[Side, Side]], group: Sequence[int], result: bool
    ) -> dict[str, dict[int, tuple[int, ...]]]:
        found: dict[str, dict[int, tuple[int, ...]]] = {"q": {}, "kv": {}}
        for rank in group:
            for side in sides[rank]:
                row = side.result if result else side.moved
                found[side.name][rank] = tuple(side.token(piece, row) for piece in side.pieces[rank])
        return found

    def _needed(self, q: Piece, kv: Piece) -> bool:
        if (q, kv) not in self._met:
            found = tiles(
                self._queries[q.owner], q.start, q.stop, self._keys[kv.owner], kv.start, kv.stop, self._problem.causal
            )
            self._met[q, kv] = next(found, None) is not None
        return self._met[q, kv]


def _cut(rank: int, share: Share, rounds: int) -> tuple[Piece, ...]:
    """Cut a rank's rows, each stratum into as many pieces where there are as many rounds; else evenly."""
    strata = len(share.strata)
    if rounds % strata:
        return tuple(Piece(rank, start, stop) for start, stop in split(share.rows, rounds))
    begins = (0, *share.strata)
    return tuple(
        Piece(rank, begins[number] + start, begins[number] + stop)
        for number in range(strata)
        for start, stop in split(begins[number + 1] - begins[number], rounds // strata)
    )


def _joined(shares: Sequence[Share], members: Sequence[int]) -> tuple[Share, tuple[Segment, ...]]:
    """What members of a group have together: stratum by stratum, and within one member by member."""
    runs: list[Run] = []
    segments, ends, at = [], [], 0
    for number in range(len(shares[0].strata)):
        for member in members:
            begins = (0, *shares[member].strata)
            start, stop = begins[number], begins[number + 1]
            inside = [run for run in shares[member].runs if start <= run.start < stop]
            runs += [run._replace(start=at + run.start - start) for run in inside]
            segments.append(Segment(member, start, stop, at))
            at += stop - start
        ends.append(at)
    return Share(tuple(runs), tuple(ends)), tuple(segments)
