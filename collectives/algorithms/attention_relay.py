"""TokenRing on a physical ring: partial results travel on with the queries and are merged on the way.

Half of the queries go one way and half the other, so that every hop is one link and both directions of it are used.
Used by `parallel.attention.layout`; see `attention_grid` for TokenRing where any two ranks have a link.
"""

from collections.abc import Sequence

from collectives.algorithms.draft import Draft
from collectives.algorithms.sequence import Attend, Copy, Merge, Needed, Piece, Side, Task, colour
from collectives.region import Range


def relay(draft: Draft, tasks: dict[str, Task], ranks: Sequence[int], q: Side, kv: Side, needed: Needed) -> None:
    """Queries go round a ring with what was found for them so far; the last one who adds to it sends it home.

    Even rounds go ahead, odd ones back, a step later. A hop takes two steps: in the first, queries move on while their
    holder attends; in the second he merges what his neighbour had found into it, to pass that on next. Tokens are
    those of `Grid`; keys are in one piece each.
    """
    attends: list[tuple[int, int, Attend, list[Range], list[Range]]] = []
    for number in range(q.rounds):
        trip = _Trip(draft, tasks, ranks, number, q, kv, needed)
        for place in range(len(ranks)):
            attends += trip.of(place)
    for rank in ranks:
        piece = kv.pieces[rank][0]
        attends.append((0, rank, Attend(Piece(rank, 0, 0), piece, None, True), *_keys(draft, kv, piece)))
    for step, rank, task, targets, data in sorted(attends):
        tasks[str(task)] = task
        draft.compute(step, rank, str(task), targets, data)


def _keys(draft: Draft, kv: Side, piece: Piece) -> tuple[list[Range], list[Range]]:
    """The tokens of the gradients of a rank's keys, and of these; empty ones where there are none."""
    sizes = (("out " + kv.name, kv.result), (kv.name, kv.moved))
    out, data = ([draft.region((key, piece.owner, 0), kv.token(piece, size))] for key, size in sizes)
    return out, data


class _Trip:
    """The way of a round's pieces."""

    def __init__(
        self,
        draft: Draft,
        tasks: dict[str, Task],
        ranks: Sequence[int],
        number: int,
        q: Side,
        kv: Side,
        needed: Needed,
    ) -> None:
        self._draft, self._tasks, self._ranks, self._number = draft, tasks, ranks, number
        self._q, self._kv, self._needed = q, kv, needed
        self._way = -1 if number % 2 else 1
        self._first = 1 + 2 * (len(ranks) + 2) * (number // 2) + number % 2

    def of(self, place: int) -> list[tuple[int, int, Attend, list[Range], list[Range]]]:
        """Let the piece of the rank at a place travel; returns who attends when to what."""
        draft, q, world = self._draft, self._q, len(self._ranks)
        piece = q.pieces[self._ranks[place]][self._number]
        if not piece.rows:
            return []
        route = [self._ranks[(place + self._way * hop) % world] for hop in range(world)]
        meets = [hop for hop, rank in enumerate(route) if not hop or self._needed(piece, self._kv.pieces[rank][0])]
        merge, copy, attends = Merge("q", piece), Copy(piece, "q"), []
        self._tasks[str(merge)] = merge
        own = draft.region((q.name, piece.owner, self._number), q.token(piece, q.moved))
        slot, home = self._shared("slot", place, piece, q.moved), self._found(place, piece, 0, meets[-1])
        if meets[-1]:
            self._tasks[str(copy)] = copy
            draft.compute(self._first - 1, piece.owner, str(copy), [slot], [own])
        for hop, rank in enumerate(route[: meets[-1] + 1]):
            step, target = self._first + 2 * hop, self._found(place, piece, hop, meets[-1])
            attends.append((step, rank, *self._attend(piece, rank, hop in meets, target, slot if hop else own)))
            if hop < meets[-1]:
                draft.move(step, rank, route[hop + 1], slot)
            if hop > 1:
                before = self._found(place, piece, hop - 1, meets[-1])
                draft.move(step, route[hop - 1], rank, before)
                draft.compute(step + 1, rank, str(merge), [target], [before, target])
            if hop and hop == meets[-1]:
                draft.move(step + 2, rank, piece.owner, target)
                draft.compute(step + 3, piece.owner, str(merge), [home], [target, home])
        return attends

    def _attend(
        self, piece: Piece, rank: int, meets: bool, target: Range, queries: Range
    ) -> tuple[Attend, list[Range], list[Range]]:
        keys = self._kv.pieces[rank][0]
        keys = keys if meets else keys._replace(stop=keys.start)
        (out,), (data,) = _keys(self._draft, self._kv, keys)
        task = Attend(piece, keys, True, False if out[0] < out[1] else None)
        return task, [target, out], [queries, data, out]

    def _found(self, place: int, piece: Piece, hop: int, last: int) -> Range:
        """Where the result of a piece is put together: the token at home; what goes there from the last rank; between.

        Results that go home are of any number of hops, where a mask is causal, so each owner has memory for them.
        """
        q = self._q
        if not hop:
            return self._draft.region(("out " + q.name, piece.owner, self._number), q.token(piece, q.result))
        if hop == last:
            size = piece.rows * q.result
            return self._draft.region(("last", self._number % 2, piece.owner), size, q.room(q.result))
        return self._shared(f"relay {hop % 2}", place, piece, q.result)

    def _shared(self, use: str, place: int, piece: Piece, row: int) -> Range:
        """Memory that pieces use in turns, neighbours never at once."""
        at = colour(place, 1, len(self._ranks))
        return self._draft.region((use, self._number % 2, at), piece.rows * row, self._q.room(row))
