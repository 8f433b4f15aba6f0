"""Bytes of each rank and direction in closed form are those of the schedules, for ranks with unequal rows too."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from collectives.errors import UsageError
from parallel.attention.formulas import RankBytes, rank_bytes, total_bytes
from parallel.attention.layout import SCHEMES, Problem, layout
from parallel.attention.shares import Balance, Run, Share
from tests.parallel.attention.played import replicated

EVEN = (13,) * 6
UNEVEN = (1, 6, 11, 5, 10, 4)


def shares(rows: tuple[int, ...]) -> tuple[Share, ...]:
    starts = itertools.accumulate((0, *rows[:-1]))
    return tuple(Share((Run(0, count, start, 1, 0),), (count,)) for count, start in zip(rows, starts, strict=True))


def problems(scheme: str, world: int) -> Iterator[Problem]:
    widths = [width for width in range(1, world + 1) if world % width == 0] if scheme in ("hybrid", "usp") else [1]
    for rows, width, parts in itertools.product((EVEN, UNEVEN), widths, (1, 3)):
        keys = shares(rows[:world])
        queries = replicated(3, world) if scheme == "tree" else keys
        yield Problem(2, 6, 2, 8, torch.bfloat16, queries, keys, False, 1.0, scheme, width, parts)


def moved(problem: Problem, backward: bool) -> list[RankBytes]:
    """What the schedule says."""
    schedule, sent, received = layout(problem, backward).schedule, Counter[int](), Counter[int]()
    for index in range(len(schedule)):
        step = schedule.step(index)
        for src, dst, size in zip(step.src.tolist(), step.dst.tolist(), (step.stop - step.start).tolist(), strict=True):
            sent[src] += size
            received[dst] += size
    return [RankBytes(sent[rank], received[rank]) for rank in range(problem.world)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_rank_sends_and_receives_what_the_formula_says(scheme: str) -> None:
    for world, backward in itertools.product((1, 2, 3, 4, 6), (False, True)):
        for problem in problems(scheme, world):
            due = [rank_bytes(problem, rank, backward) for rank in range(world)]
            assert due == moved(problem, backward), problem
            assert sum(mine.sent for mine in due) == total_bytes(problem, "contiguous", backward), problem
            assert world == 1 or sum(mine.sent for mine in due) > 0


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "tree"])
def test_all_ranks_together_send_what_a_mask_leaves(scheme: str) -> None:
    for world, balance, causal, parts, backward in itertools.product(
        (2, 3, 4), ("contiguous", "zigzag", "striped"), (False, True), (1, 5), (False, True)
    ):
        for width in (1, 2) if scheme in ("hybrid", "usp") and world != 3 else (1,):
            cut = Balance(balance).shares(64 if causal else 71, world)
            problem = Problem(1, 4, 2, 8, torch.float32, cut, cut, causal, 1.0, scheme, width, parts)
            sent = [mine.sent for mine in moved(problem, backward)]
            assert sum(sent) == total_bytes(problem, balance, backward), problem
            if not causal:
                assert sent == [rank_bytes(problem, rank, backward).sent for rank in range(world)], problem


def test_a_mask_spares_bytes_that_only_the_total_counts() -> None:
    keys = shares(EVEN)
    problem = Problem(1, 2, 2, 4, torch.float32, keys, keys, True, 1.0, "ring")
    with pytest.raises(UsageError, match="see total_bytes"):
        rank_bytes(problem, 0)
