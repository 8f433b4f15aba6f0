"""How many bytes each scheme sends, in closed form: what `ringhold attention` and the tests hold the counters to.

With n rows a rank, q, kv and out the bytes of a row of what travels and of what comes back, N ranks: a ring sends
(N-1) n kv a rank, TokenRing (N-1) n (q + out), and so on, of any lengths. Where a mask is causal, pieces travel only as
far as somebody needs them: of zigzag, half of the rows go all the way and half go r hops from rank r: 3/4 in all.
"""

from collections.abc import Callable, Sequence

from collectives.errors import UsageError
from parallel.attention.layout import Problem, heads_of, row_bytes
from parallel.attention.shares import Share

Hops = Callable[[int, int], int]
"""(place of the owner, stratum): how many hops its rows make."""


def total_bytes(problem: Problem, balance: str, backward: bool = False) -> int:
    """Bytes that all ranks together send, with at least one row in each stratum of each rank.

    Args:
        problem: of one document; queries and keys of one length where it is causal.
        balance: the name of the balance that its shares were cut by.

    """
    if problem.scheme == "tree":
        return 2 * (problem.world - 1) * row_bytes(problem, backward, "out q") * problem.queries[0].rows
    if problem.head_ranks > 1:
        return _by_heads(problem, balance, backward)
    q, out, kv, back = (row_bytes(problem, backward, side) for side in ("q", "out q", "kv", "out kv"))
    columns = {"token_ring": problem.world, "token_ring_relay": problem.world, "hybrid": problem.columns}
    width = columns.get(problem.scheme, 1)
    rows = problem.world // width
    kind = balance if problem.causal else "all"

    def q_hops(owner: int, stratum: int) -> int:
        row, column = divmod(owner, width)
        early = kind == "contiguous" or (kind == "zigzag" and not stratum)
        return column if early and not row else width - 1

    def kv_hops(owner: int, stratum: int) -> int:
        row = owner // width
        if kind == "contiguous":
            return rows - 1 - row
        return row if kind == "zigzag" and stratum else rows - 1

    return (q + out) * _moved(problem.queries, q_hops) + (kv + back) * _moved(problem.keys, kv_hops)


def rank_bytes(problem: Problem, rank: int, backward: bool = False) -> int:
    """Bytes that a rank sends in a ring or TokenRing without a mask, whose pieces all go one way.

    Raises:
        UsageError: another scheme, or a causal mask.

    """
    if problem.scheme not in ("ring", "token_ring") or problem.causal:
        raise UsageError("rank_bytes knows ring and token_ring without a mask; see total_bytes")
    q, out, kv, back = (row_bytes(problem, backward, side) for side in ("q", "out q", "kv", "out kv"))
    moved, found, shares = (kv, back, problem.keys) if problem.scheme == "ring" else (q, out, problem.queries)
    rows, ahead = sum(share.rows for share in shares), shares[(rank + 1) % problem.world].rows
    return moved * (rows - ahead) + found * (rows - shares[rank].rows)


def _by_heads(problem: Problem, balance: str, backward: bool) -> int:
    """Heads to those who compute with them and back, and the ring of groups between."""
    share, total = problem.head_ranks, 0
    groups = problem.world // share
    kind = balance if problem.causal else "all"

    def hops(owner: int, stratum: int) -> int:
        group = owner // share
        if kind == "contiguous":
            return groups - 1 - group
        return group if kind == "zigzag" and stratum else groups - 1

    for rank in range(share):
        heads = heads_of(problem, rank)
        q, out, kv, back = (row_bytes(problem, backward, side, heads) for side in ("q", "out q", "kv", "out kv"))
        others = [owner for owner in range(problem.world) if owner % share != rank]
        total += (q + out) * sum(problem.queries[owner].rows for owner in others)
        total += (kv + back) * sum(problem.keys[owner].rows for owner in others)
        total += (kv + back) * _moved(problem.keys, hops)
    return total


def _moved(shares: Sequence[Share], hops: Hops) -> int:
    """Rows times hops."""
    total = 0
    for owner, share in enumerate(shares):
        for stratum, (start, stop) in enumerate(zip((0, *share.strata), share.strata, strict=False)):
            total += (stop - start) * hops(owner, stratum)
    return total
