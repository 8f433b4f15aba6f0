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
from collectives.algorithms.sequence import Attend, Copy, Merge, Needed, Piece, Side, Task, colour
from collectives.region import Range

_SPACED = 3
"""Steps from one use of a piece to the next: in the last of them copies are made, and results merged."""

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

    As many rounds of a side travel at once as the first of its `lanes` that divides their number. The tokens ("q",
    owner, round) and ("kv", owner, round) must be there from step `first` on; ("out q", owner, round), and where the
    side has a result ("out kv", owner, round), are complete behind step `end`.

    What travels takes memory for two or three pieces a lane: one is computed with while the next arrives. Only where
    queries meet keys that travel as well are those of the whole row kept, until the last keys have passed.
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
        lanes: tuple[Sequence[int], Sequence[int]],
    ) -> None:
        self._draft, self._tasks = draft, tasks
        self._ranks, self._q, self._kv, self._needed = ranks, q, kv, needed
        self._rows, self._columns = len(ranks), len(ranks[0])
        self._keeps = self._rows > 1 or kv.rounds > 1
        self._abreast = {
            side.name: next((count for count in counts if side.rounds % count == 0), 1)
            for side, counts in zip((q, kv), lanes, strict=True)
        }
        if self._keeps:
            self._abreast[q.name] = q.rounds
        self._first = first + 1
        self._seen: set[tuple[int, str, Piece]] = set()
        self.end = self._step(kv.rounds - 1, self._rows - 1, q.rounds - 1, self._columns - 1) + 5
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
        return self._first + _SPACED * (places[0] * self._q.rounds * self._columns + places[1])

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
        met = piece if here else piece._replace(stop=piece.start)
        visits = product(range(self._q.rounds), range(self._columns))
        for q_round, hop in sorted(visits, key=lambda at: self._step(number, turn, *at)):
            self._queries(row, column, number, turn, q_round, hop, met)
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
        span = self._data(side, piece, number, 1)
        if not hop:
            task = Copy(piece, side.name)
            self._tasks[str(task)] = task
            self._draft.compute(step - 1, rank, str(task), [span], [self._data(side, piece, number, 0)])
        self._draft.move(step, rank, ahead, span)

    def _send_home(self, side: Side, piece: Piece, number: int, hop: int, step: int, rank: int) -> None:
        """Send what was found for a piece to its owner, who merges it, both behind what they do in the next step."""
        if (rank, side.name, piece) not in self._seen or not piece.rows:
            return
        partial = self._target(side, piece, number, hop)
        self._draft.move(step + _SPACED + 1, rank, piece.owner, partial)
        task = Merge(side.name, piece)
        self._tasks[str(task)] = task
        home = self._target(side, piece, number, 0)
        self._draft.compute(step + _SPACED + 2, piece.owner, str(task), [home], [partial, home])

    # --- where things are ---

    def _data(self, side: Side, piece: Piece, number: int, hop: int) -> Range:
        """Where a piece is: the token at home, or while it travels."""
        if not hop:
            return self._draft.region((side.name, piece.owner, number), side.token(piece, side.moved))
        return self._shared("slot", side, piece, number, 1, side.moved)

    def _target(self, side: Side, piece: Piece, number: int, hop: int) -> Range:
        """Where the result of a piece is put together: the token at home, or at a rank after so many hops.

        If pieces travel one at a time, the next one's is elsewhere: it is begun before this one's has left.
        """
        if not hop:
            return self._draft.region(("out " + side.name, piece.owner, number), side.token(piece, side.result))
        turn = hop % 2 if self._abreast[side.name] == 1 else 0
        return self._shared(f"partial {turn}", side, piece, number, hop, side.result)

    def _shared(self, use: str, side: Side, piece: Piece, number: int, hop: int, row: int) -> Range:
        """Memory that pieces use in turns, if none of them is kept, and those of owners `hop` apart never at once.

        Each grid of a draft has its own: ranks of another may have more heads.
        """
        if side is self._q and self._keeps:
            return self._draft.region((use, side.name, piece.owner, number), piece.rows * row)
        place = self._place(piece.owner)
        at = colour(place[1], hop, self._columns) if side is self._q else colour(place[0], hop, self._rows)
        lane = number % self._abreast[side.name]
        grid = self._ranks[0][0]
        return self._draft.region((use, side.name, grid, lane, at), piece.rows * row, side.room(row))
