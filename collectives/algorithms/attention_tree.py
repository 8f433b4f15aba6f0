"""Decoding: a few queries that every rank has, against keys spread over the ranks in any way.

Partial results are merged along a binomial tree to rank 0, and the result goes back the same way, so that all have the
same bits: DistAttention (Lin et al., 2024, arXiv:2401.02669). Used by `parallel.attention.layout`.
"""

from collections.abc import Sequence

from collectives.algorithms.draft import Draft
from collectives.algorithms.sequence import TOKEN, Attend, Merge, Piece, Task, TreeSizes


def tree(draft: Draft, tasks: dict[str, Task], q: Piece, keys: Sequence[Piece], sizes: TreeSizes) -> None:
    """Every rank holds the tokens ("q", rank, 0) and ("kv", rank, 0); all want the same region, which has the result.

    For gradients of keys they want the token ("out kv", rank, 0) as well.
    """
    world = len(keys)
    levels = (world - 1).bit_length()
    level = [(rank & -rank).bit_length() - 1 if rank else levels for rank in range(world)]
    found = [draft.region(("found", at), sizes.result) for at in range(levels + 1)]
    for rank, piece in enumerate(keys):
        firsts = [True if size else None for size in (sizes.result, sizes.kv_result * piece.rows)]
        task = Attend(q._replace(owner=rank), piece, *firsts)
        tasks[str(task)] = task
        tokens = [(TOKEN if size else 0) for size in (sizes.q, sizes.kv * piece.rows, sizes.kv_result * piece.rows)]
        draft.hold(rank, ("q", rank, 0), tokens[0])
        draft.hold(rank, ("kv", rank, 0), tokens[1])
        draft.want(rank, ("found", levels), sizes.result)
        draft.want(rank, ("out kv", rank, 0), tokens[2])
        data = [draft.region((side, rank, 0), size) for side, size in zip(("q", "kv"), tokens, strict=False)]
        targets = [found[level[rank]], draft.region(("out kv", rank, 0), tokens[2])]
        draft.compute(0, rank, str(task), targets, data)
    merge = Merge("q", q)
    if levels:
        tasks[str(merge)] = merge
    for at in range(levels):
        for rank in (rank for rank in range(1, world) if level[rank] == at):
            parent = rank - (1 << at)
            draft.move(1 + 2 * at, rank, parent, found[at])
            draft.compute(2 + 2 * at, parent, str(merge), [found[level[parent]]], [found[at], found[level[parent]]])
    for turn, at in enumerate(reversed(range(levels))):
        for rank in (rank for rank in range(1, world) if level[rank] == at):
            draft.move(1 + 2 * levels + turn, rank - (1 << at), rank, found[levels])
