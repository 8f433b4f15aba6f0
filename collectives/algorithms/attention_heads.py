"""Heads brought together before attention and taken apart behind it, by all-to-all within groups of ranks.

DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509); with a ring of such groups, USP (Fang and Zhao, 2024,
arXiv:2405.07719). Used by `parallel.attention.layout`.
"""

from collections.abc import Sequence
from typing import TypeAlias

from collectives.algorithms.draft import Draft
from collectives.algorithms.sequence import Pack, Task, Tokens, Unpack

Parts: TypeAlias = dict[str, dict[tuple[int, int], int]]
"""By side and (rank that has the rows, rank that has the heads), bytes."""


def exchange(draft: Draft, tasks: dict[str, Task], group: Sequence[int], parts: Parts, tokens: Tokens) -> None:
    """Each rank of a group gets from all others its heads of their rows, and packs them; in steps 0 and 1.

    Sources hold the regions ("in " + side, source, destination); they are packed into tensors for which the tokens
    (side, rank, round) of `tokens[side][rank]` stand.
    """
    for side, sizes in parts.items():
        for dst in group:
            incoming = []
            for src in group:
                key = ("in " + side, src, dst)
                draft.hold(src, key, sizes[src, dst])
                incoming.append(draft.region(key, sizes[src, dst]))
                draft.move(0, src, dst, incoming[-1])
            task = Pack(side, dst)
            tasks[str(task)] = task
            packed = [draft.region((side, dst, number), size) for number, size in enumerate(tokens[side][dst])]
            draft.compute(1, dst, str(task), packed, incoming)


def give_back(
    draft: Draft, tasks: dict[str, Task], first: int, group: Sequence[int], parts: Parts, tokens: Tokens
) -> None:
    """The reverse, from step `first` on: results of the tokens ("out " + side, rank, round) go where rows came from.

    There they are wanted as the regions ("back " + side, that rank, the rank with the heads).
    """
    for side, sizes in parts.items():
        for dst in group:
            found = [draft.region(("out " + side, dst, number), size) for number, size in enumerate(tokens[side][dst])]
            outgoing = [draft.region(("back " + side, src, dst), sizes[src, dst]) for src in group]
            task = Unpack(side, dst)
            tasks[str(task)] = task
            draft.compute(first, dst, str(task), outgoing, found)
            for src, span in zip(group, outgoing, strict=True):
                draft.want(src, ("back " + side, src, dst), sizes[src, dst])
                draft.move(first + 1, dst, src, span)
