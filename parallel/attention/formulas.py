"""How many bytes each scheme sends, in closed form: what `ringhold attention` and the tests hold the counters to.

With n rows a rank, q, kv and out the bytes of a row of what travels and of what comes back, N ranks: a ring sends
(N-1) n kv a rank, TokenRing (N-1) n (q + out), and so on, of any lengths. Where a mask is causal, pieces travel only as
far as somebody needs them: of zigzag, half of the rows go all the way and half go r hops from rank r: 3/4 in all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from collectives.errors import UsageError
from collectives.region import split
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
    kind = balance if problem.causal else "all"
    if problem.scheme == "token_ring_relay":
        return (q + out) * _moved_both_ways(problem, kind)
    width = {"token_ring": problem.world, "hybrid": problem.columns}.get(problem.scheme, 1)
    rows = problem.world // width

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


class RankBytes(NamedTuple):
    """Bytes of one rank, by direction."""

    sent: int
    received: int

    def __add__(self, other: tuple[object, ...]) -> "RankBytes":
        """Both together."""
        return RankBytes(*(int(a) + int(b) for a, b in zip(self, cast(RankBytes, other), strict=True)))


def rank_bytes(problem: Problem, rank: int, backward: bool = False) -> RankBytes:
    """Bytes that a rank sends and receives where no mask spares any; of any lengths.

    Raises:
        UsageError: a causal mask, of which only the total is known: see `total_bytes`.

    """
    if problem.causal:
        raise UsageError("rank_bytes knows problems without a mask; see total_bytes")
    if problem.scheme == "tree":
        return _in_tree(problem, rank, backward)
    if problem.head_ranks > 1:
        return _of_heads(problem, rank, backward) + _of_groups(problem, rank, backward)
    q, out, kv, back = (row_bytes(problem, backward, side) for side in ("q", "out q", "kv", "out kv"))
    queries, keys = ([share.rows for share in shares] for shares in (problem.queries, problem.keys))
    if problem.scheme == "token_ring_relay":
        return _relayed(problem, rank, q, out)
    if problem.scheme == "bidirectional":
        return _both_ways(problem, rank, kv) + _home(keys, rank, back)
    width = {"token_ring": problem.world, "hybrid": problem.columns}.get(problem.scheme, 1)
    row, column = divmod(rank, width)
    within, across = queries[row * width : (row + 1) * width], keys[column::width]
    return _round(within, column, q) + _home(within, column, out) + _round(across, row, kv) + _home(across, row, back)


def _round(rows: Sequence[int], place: int, size: int) -> RankBytes:
    """A ring in which everybody's rows visit all others: all is passed on but what the next one owns."""
    total = sum(rows)
    return RankBytes(size * (total - rows[(place + 1) % len(rows)]), size * (total - rows[place]))


def _home(rows: Sequence[int], place: int, size: int) -> RankBytes:
    """Everybody sends each owner what he found for his rows."""
    return RankBytes(size * (sum(rows) - rows[place]), size * (len(rows) - 1) * rows[place])


def _ways(share: Share, parts: int) -> list[tuple[int, int]]:
    """Of each stratum the rows that go ahead, and those that go back: pieces take turns."""
    rounds, begins = parts + parts % 2, (0, *share.strata)
    sizes = [stop - start for start, stop in zip(begins, share.strata, strict=False)]
    if rounds % len(sizes):
        sizes = [share.rows]
    found, first = [], 0
    for size in sizes:
        pieces = [stop - start for start, stop in split(size, rounds // len(sizes))]
        found.append((sum(pieces[first % 2 :: 2]), sum(pieces[1 - first % 2 :: 2])))
        first += len(pieces)
    return found


def _halves(shares: Sequence[Share], parts: int) -> tuple[list[int], list[int]]:
    """Of each owner the rows that go ahead, and those that go back."""
    ways = [_ways(share, parts) for share in shares]
    return [sum(ahead for ahead, _ in mine) for mine in ways], [sum(back for _, back in mine) for mine in ways]


def _moved_both_ways(problem: Problem, kind: str) -> int:
    """Rows times hops of queries that go on to the last rank that has keys for them; early ones need lower ranks."""
    total, most = 0, problem.world - 1
    for owner, share in enumerate(problem.queries):
        for stratum, (ahead, back) in enumerate(_ways(share, problem.parts)):
            early = kind == "contiguous" or (kind == "zigzag" and not stratum)
            hops = (most if owner else 0, owner) if early else (most, most)
            total += ahead * hops[0] + back * hops[1]
    return total


def _both_ways(problem: Problem, rank: int, size: int) -> RankBytes:
    """Two rings of halves of the keys, of which one turns the other way."""
    ahead, back = _halves(problem.keys, problem.parts)
    return _round(ahead, rank, size) + _round(back[::-1], problem.world - 1 - rank, size)


def _relayed(problem: Problem, rank: int, q: int, out: int) -> RankBytes:
    """Queries go round both ways; each other rank passes on what was found for a piece, the last of them home."""
    found = RankBytes(0, 0)
    for way, rows in enumerate(_halves(problem.queries, problem.parts)):
        line, place = (rows[::-1], problem.world - 1 - rank) if way else (rows, rank)
        total = sum(line)
        results = RankBytes(out * (total - line[place]), out * (total - line[place - 1])) if len(line) > 1 else found
        found += _round(line, place, q) + results
    return found


def _of_heads(problem: Problem, rank: int, backward: bool) -> RankBytes:
    """Rows to those of the group who compute with the heads, and results back."""
    share = problem.head_ranks
    group = range(rank // share * share, (rank // share + 1) * share)
    sent = received = 0
    for there, back, shares in (("q", "out q", problem.queries), ("kv", "out kv", problem.keys)):
        for other in group:
            if other != rank:
                mine, theirs = (heads_of(problem, owner) for owner in (rank, other))
                away, here = shares[rank].rows, shares[other].rows
                sent += away * row_bytes(problem, backward, there, theirs)
                sent += here * row_bytes(problem, backward, back, mine)
                received += here * row_bytes(problem, backward, there, mine)
                received += away * row_bytes(problem, backward, back, theirs)
    return RankBytes(sent, received)


def _of_groups(problem: Problem, rank: int, backward: bool) -> RankBytes:
    """The ring of groups: keys of a whole group, with this rank's heads, go round."""
    share, heads = problem.head_ranks, heads_of(problem, rank)
    rows = [sum(one.rows for one in problem.keys[start : start + share]) for start in range(0, problem.world, share)]
    kv, back = (row_bytes(problem, backward, side, heads) for side in ("kv", "out kv"))
    return _round(rows, rank // share, kv) + _home(rows, rank // share, back)


def _in_tree(problem: Problem, rank: int, backward: bool) -> RankBytes:
    """The result of all queries, to the parent and back, and the same with each child."""
    size = row_bytes(problem, backward, "out q") * problem.queries[0].rows
    levels = (problem.world - 1).bit_length()
    level = (rank & -rank).bit_length() - 1 if rank else levels
    children = sum(rank + (1 << at) < problem.world for at in range(level))
    links = children + (rank > 0)
    return RankBytes(size * links, size * links)


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
