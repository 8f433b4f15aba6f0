"""TokenRing on a physical ring: partial results travel on with the queries and are merged on the way.

Half of the queries go one way and half the other, so that every hop is one link and both directions of it are used.
Used by `parallel.attention.layout`; see `attention_grid` for TokenRing where any two ranks have a link.
"""

from collections.abc import Sequence

from collectives.algorithms.draft import Draft
from collectives.algorithms.sequence import Attend, Merge, Needed, Piece, Side, Task
from collectives.region import Range


def relay(draft: Draft, tasks: dict[str, Task], ranks: Sequence[int], q: Side, kv: Side, needed: Needed) -> None:
    """Queries go round a ring with what was found for them so far; the last one who adds to it sends it home.

    Even rounds go ahead, odd ones back, a step later. A hop takes two steps: in the first, queries move on while their
    holder attends; in the second he merges what his neighbour had found into it, to pass that on next. Regions are
    those of `Grid`; keys are in one piece each.
    """
    attends: list[tuple[int, int, Piece, Piece, Range, Range]] = []
    for number in range(q.rounds):
        first = 1 + 2 * (len(ranks) + 1) * (number // 2) + number % 2
        for place, owner in enumerate(ranks):
            way, piece = -1 if number % 2 else 1, q.pieces[owner][number]
            if piece.rows:
                route = [ranks[(place + way * hop) % len(ranks)] for hop in range(len(ranks))]
                attends += _trip(draft, tasks, route, piece, number, first, q, kv, needed)
    for rank in ranks:
        piece = kv.pieces[rank][0]
        clear = Attend(Piece(rank, 0, 0), piece, None, True)
        tasks[str(clear)] = clear
        out, data = (draft.region((key, rank, 0), piece.rows * size) for key, size in _places(kv))
        draft.compute(0, rank, str(clear), [out], [data])
    for step, rank, piece, keys, data, target in sorted(attends):
        out, mine = (draft.region((key, rank, 0), keys.rows * size) for key, size in _places(kv))
        task = Attend(piece, keys, True, False if out[0] < out[1] else None)
        tasks[str(task)] = task
        draft.compute(step, rank, str(task), [target, out], [data, mine, out])


def _places(side: Side) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("out " + side.name, side.result), (side.name, side.moved)


def _trip(
    draft: Draft,
    tasks: dict[str, Task],
    route: Sequence[int],
    piece: Piece,
    number: int,
    first: int,
    q: Side,
    kv: Side,
    needed: Needed,
) -> list[tuple[int, int, Piece, Piece, Range, Range]]:
    """Let one piece travel; returns who attends when to which keys: (step, rank, q, keys, data, target)."""
    (out, result), (name, moved) = _places(q)
    found = [draft.region((out, piece.owner, number), piece.rows * result)]
    found += [draft.region(("relay", piece.owner, number, odd), piece.rows * result) for odd in (1, 0)]
    data = draft.region((name, piece.owner, number), piece.rows * moved)
    meets = [hop for hop, rank in enumerate(route) if not hop or needed(piece, kv.pieces[rank][0])]
    merge, attends = Merge("q", piece), []
    tasks[str(merge)] = merge
    for hop, rank in enumerate(route[: meets[-1] + 1]):
        step, target = first + 2 * hop, found[2 - hop % 2 if hop else 0]
        keys = kv.pieces[rank][0]
        attends.append((step, rank, piece, keys if hop in meets else keys._replace(stop=keys.start), data, target))
        if hop < meets[-1]:
            draft.move(step, rank, route[hop + 1], data)
        if hop > 1:
            before = found[1 + hop % 2]
            draft.move(step, route[hop - 1], rank, before)
            draft.compute(step + 1, rank, str(merge), [target], [before, target])
        if hop and hop == meets[-1]:
            draft.move(step + 2, rank, piece.owner, target)
            draft.compute(step + 3, piece.owner, str(merge), [found[0]], [target, found[0]])
    return attends
