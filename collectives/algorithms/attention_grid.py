"""Attention over a grid of ranks: which of queries and keys travel, and where partial results go.

Ranks stand in rows (nodes) and columns. Queries go round within a row and their partial results, (out, lse) or
gradients, are sent straight home as soon as they are complete; keys and values go round within a column.

- one column: KV go round a ring and queries stay: Ring Attention (Liu, Zaharia and Abbeel, 2023, arXiv:2310.01889);
- one row: queries go round, KV stay: TokenRing (Wang et al., 2024, arXiv:2412.20501);
- several of both: TokenRing inside a node, a KV ring across nodes.

Used by `parallel.attention.layout`.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TypeAlias

from collectives.algorithms.draft import Draft
from collectives.algorithms.sequence import Attend, Copy, Merge, Needed, Piece, Side, Task
from collectives.region import Range

Direction: TypeAlias = Callable[[int, tuple[int, int]], int]
"""(round, (hops ahead, hops back)): +1 or -1, where pieces of the round go."""


def shortest(causal: bool) -> Direction:
    """Go where fewer hops are needed; if that is all the same ahead, or, where a mask is causal, back.

    Back, the pieces of zigzag that travel all the way and those that travel half of it keep in step.
    """

    def choose(_round: int, hops: tuple[int, int]) -> int:
        ahead, back = hops
        if ahead == back:
            return -1 if causal else 1
        return 1 if ahead < back else -1

    return choose


def both_ways(number: int, hops: tuple[int, int]) -> int:
    """Even rounds go ahead and odd ones back, but for those that have it nearer one way."""
    ahead, back = hops
    if ahead != back:
        return 1 if ahead < back else -1
    return -1 if number % 2 else 1


class Grid:
    """Adds attention over a grid of ranks to a draft. `ranks[row][column]`; owners are the ranks themselves.

    `abreast` rounds of the keys, a divisor of their number, travel at once, and all of the queries. The regions
    ("q", owner, round) and ("kv", owner, round) must be there from step `first` on; ("out q", owner, round), and
    ("out kv", owner, round) where the side has a result, are complete behind step `end`.
    """

    def __init__(
        self,
        draft: Draft,
        tasks: dict[str, Task],
        first: int,
        ranks: Sequence[Sequence[int]],
        q: Side,
        kv: Side,
        needed: Needed,
        q_way: Direction,
        kv_way: Direction,
        abreast: int,
    ) -> None:
        self._abreast = {q.name: q.rounds, kv.name: abreast}
        self._draft, self._tasks = draft, tasks
        self._ranks, self._q, self._kv, self._needed = ranks, q, kv, needed
        self._rows, self._columns = len(ranks), len(ranks[0])
        self._first = first + 1
        self._seen: set[tuple[int, str, Piece]] = set()
        self.end = self._step(kv.rounds - 1, self._rows - 1, q.rounds - 1, self._columns - 1) + 2
        self._q_trips = [self._trip(q, number, q_way) for number in range(q.rounds)]
        self._kv_trips = [self._trip(kv, number, kv_way) for number in range(kv.rounds)]

    def build(self) -> None:
        """Add everything; at each rank in the order of steps, so that who sets a result is known."""
        turns = product(range(self._kv.rounds), range(self._rows))
        for number, turn in sorted(turns, key=lambda at: self._step(at[0], at[1], 0, 0)):
            for row, column in product(range(self._rows), range(self._columns)):
                self._keys(row, column, number, turn)

    def _step(self, kv_round: int, turn: int, q_round: int, hop: int) -> int:
        places = []
        for side, number, at, stations in (
            (self._kv, kv_round, turn, self._rows),
            (self._q, q_round, hop, self._columns),
        ):
            abreast = self._abreast[side.name]
            together, place = divmod(number, abreast)
            places.append((together * stations + at) * abreast + place)
        return self._first + places[0] * self._q.rounds * self._columns + places[1]

    # --- who travels how far ---

    def _trip(self, side: Side, number: int, way: Direction) -> tuple[int, dict[int, int]]:
        """The direction of a round, and by owner how many hops its piece makes."""
        found = {step: {owner: self._hops(side, owner, number, step) for owner in side.pieces} for step in (1, -1)}
        chosen = way(number, (sum(found[1].values()), sum(found[-1].values())))
        return chosen, found[chosen]

    def _hops(self, side: Side, owner: int, number: int, step: int) -> int:
        """How many hops in that direction reach all who need a piece."""
        row, column = self._place(owner)
        piece = side.pieces[owner][number]
        if not piece.rows:
            return 0
        if side is self._q:
            met = [
                [ranks[(column + step * hop) % self._columns] for ranks in self._ranks] for hop in range(self._columns)
            ]
        else:
            met = [list(self._ranks[(row + step * hop) % self._rows]) for hop in range(self._rows)]
        return max(hop for hop, owners in enumerate(met) if not hop or self._any(piece, owners, side))

    def _any(self, piece: Piece, owners: Sequence[int], side: Side) -> bool:
        """Whether a piece of this side meets any that these own on the other."""
        if side is self._q:
            return any(self._needed(piece, other) for owner in owners for other in self._kv.pieces[owner])
        return any(self._needed(other, piece) for owner in owners for other in self._q.pieces[owner])

    def _place(self, rank: int) -> tuple[int, int]:
        return next((row, ranks.index(rank)) for row, ranks in enumerate(self._ranks) if rank in ranks)

    # --- what happens at a rank while it has certain keys ---

    def _keys(self, row: int, column: int, number: int, turn: int) -> None:
        """Keys of a round at the rank where they are after `turn` hops: pass on, use, send their gradient home."""
        side, rank = self._kv, self._ranks[row][column]
        way, hops = self._kv_trips[number]
        owner = self._ranks[(row - way * turn) % self._rows][column]
        piece = side.pieces[owner][number]
        begin = self._step(number, turn, 0, 0)
        self._pass_on(
            side, piece, number, turn, hops[owner], begin, rank, self._ranks[(row + way) % self._rows][column]
        )
        here = turn <= hops[owner]
        for hop in range(self._columns):
            for q_round in range(self._q.rounds):
                self._queries(
                    row, column, number, turn, q_round, hop, piece if here else piece._replace(stop=piece.start)
                )
        if turn and side.result:
            last = self._step(number, turn, self._q.rounds - 1, self._columns - 1)
            self._send_home(side, piece, number, turn, last, rank)

    def _queries(self, row: int, column: int, number: int, turn: int, q_round: int, hop: int, keys: Piece) -> None:
        """Queries of a round at the rank where they are after `hop` hops: pass on, use, send their result home."""
        side, rank = self._q, self._ranks[row][column]
        way, hops = self._q_trips[q_round]
        owner = self._ranks[row][(column - way * hop) % self._columns]
        piece = side.pieces[owner][q_round]
        step = self._step(number, turn, q_round, hop)
        if not number and not turn:
            ahead = self._ranks[row][(column + way) % self._columns]
            self._pass_on(side, piece, q_round, hop, hops[owner], step, rank, ahead)
        if hop <= hops[owner]:
            self._attend(step, rank, (piece, q_round, hop), (keys, number, turn))
        if hop and number == self._kv.rounds - 1 and turn == self._rows - 1:
            self._send_home(side, piece, q_round, hop, step, rank)

    def _attend(self, step: int, rank: int, q: tuple[Piece, int, int], kv: tuple[Piece, int, int]) -> None:
        draft, (queries, _, hop), (keys, _, turn) = self._draft, q, kv
        targets = {"q": self._target(self._q, *q), "kv": self._target(self._kv, *kv)}
        fresh = {
            name: (rank, name, piece) not in self._seen and target[0] < target[1]
            for (name, target), piece in zip(targets.items(), (queries, keys), strict=True)
        }
        own = not hop and not turn
        if not (self._needed(queries, keys) or (own and any(fresh.values()))):
            return
        self._seen |= {(rank, "q", queries), (rank, "kv", keys)}
        first = {name: fresh[name] if low < high else None for name, (low, high) in targets.items()}
        task = Attend(queries, keys, first["q"], first["kv"])
        self._tasks[str(task)] = task
        data = [self._data(self._q, *q), self._data(self._kv, *kv)]
        draft.compute(step, rank, str(task), targets.values(), [*data, *(targets[n] for n in targets if not fresh[n])])

    def _pass_on(
        self, side: Side, piece: Piece, number: int, hop: int, hops: int, step: int, rank: int, ahead: int
    ) -> None:
        """Send a piece to the next rank, if anybody there or beyond needs it."""
        if hop >= hops or not piece.rows:
            return
        span = self._slot(side, piece, number)
        if not hop and self._reuses(side):
            task = Copy(piece, side.name)
            self._tasks[str(task)] = task
            self._draft.compute(step - 1, rank, str(task), [span], [self._own(side, piece, number)])
        self._draft.move(step, rank, ahead, span)

    def _send_home(self, side: Side, piece: Piece, number: int, hop: int, step: int, rank: int) -> None:
        """Send what was found for a piece to its owner, who merges it."""
        if (rank, side.name, piece) not in self._seen or not piece.rows:
            return
        partial = self._target(side, piece, number, hop)
        self._draft.move(step + 1, rank, piece.owner, partial)
        task = Merge(side.name, piece)
        self._tasks[str(task)] = task
        home = self._target(side, piece, number, 0)
        self._draft.compute(step + 2, piece.owner, str(task), [home], [partial, home])

    # --- where things are ---

    def _reuses(self, side: Side) -> bool:
        """Whether the rounds of a side follow each other through the same memory."""
        return side.rounds > self._abreast[side.name]

    def _own(self, side: Side, piece: Piece, number: int) -> Range:
        return self._draft.region((side.name, piece.owner, number), piece.rows * side.moved)

    def _slot(self, side: Side, piece: Piece, number: int) -> Range:
        """Where a piece is while it travels."""
        if not self._reuses(side):
            return self._own(side, piece, number)
        place = ("slot", side.name, piece.owner, number % self._abreast[side.name])
        return self._draft.region(place, piece.rows * side.moved, side.room(side.moved))

    def _data(self, side: Side, piece: Piece, number: int, hop: int) -> Range:
        return self._slot(side, piece, number) if hop else self._own(side, piece, number)

    def _target(self, side: Side, piece: Piece, number: int, hop: int) -> Range:
        """Where the result of a piece is put together: at home, or at a rank after so many hops.

        Neighbours use different memory, so that one can be merged at home while the next arrives.
        """
        size = piece.rows * side.result
        if not hop:
            return self._draft.region(("out " + side.name, piece.owner, number), size)
        place = ("partial", side.name, piece.owner, number % self._abreast[side.name], hop % 2)
        if not self._reuses(side):
            return self._draft.region((*place, number), size)
        return self._draft.region(place, size, side.room(side.result))
