"""Rows of uneven number: all-gather, reduce-scatter, all-to-all."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from collectives import choice
from collectives.communicator import Communicator
from collectives.errors import DescriptorMismatch
from collectives.outcome import Outcome
from tests.conformance.operations.cases import UNREDUCED, contributions, ops_of
from tests.conformance.values import DTYPES, exact, laid_out, reduced
from tests.harness.peer import bits

RESTS: list[list[int]] = [[], [3], [0], [5, 2], [40_001]]


def rows_of(world: int, number: int) -> list[int]:
    """How many rows each rank has: none, few, and one with many."""
    return [(number * 7 + rank * 3) % 5 + 20 * (rank == number % world) for rank in range(world)]


def check(comm: Communicator, outcome: Outcome, expected: Tensor, counts: list[int], case: object) -> None:
    """A healthy group's outcome with these bits and counts."""
    assert outcome.result is not None, case
    assert outcome.result.dtype == expected.dtype, case
    assert torch.equal(outcome.result, expected), case
    assert (outcome.contributors, outcome.counts, outcome.attempts) == (comm.members, tuple(counts), 1), case


def gather_uneven_rows(comm: Communicator) -> list[str]:
    """All-gather, with counts that the members know and with such that they tell each other."""
    digests = []
    cases = [(name, [3], algorithm) for name, algorithm in product(UNREDUCED, choice.names("all_gather"))]
    cases += [("float32", rest, "auto") for rest in RESTS]
    for number, (name, rest, algorithm) in enumerate(cases):
        dtype, counts = getattr(torch, name), rows_of(comm.size, number)
        inputs = [exact(r, [counts[r], *rest], torch.int16, "sum", number).to(dtype) for r in range(comm.size)]
        tensor = laid_out(inputs[comm.rank], "strided" if rest and number % 2 else "contiguous")
        for known in (counts, None):
            outcome = comm.all_gather_v(tensor, known, algorithm=algorithm)
            check(comm, outcome, torch.cat(inputs), counts, (name, rest, algorithm, counts))
        digests.append(bits(torch.cat(inputs)))
    return digests


def scatter_uneven_reductions(comm: Communicator) -> list[str]:
    """Reduce-scatter; the digests are those of the whole that the shares are cut from."""
    digests = []
    cases = [(name, [3], algorithm) for name, algorithm in product(DTYPES, choice.names("reduce_scatter"))]
    cases += [("float32", rest, "auto") for rest in RESTS]
    for number, (name, rest, algorithm) in enumerate(cases):
        ops, counts = ops_of(getattr(torch, name)), rows_of(comm.size, number)
        op = ops[number % len(ops)]
        inputs = contributions(comm, [sum(counts), *rest], getattr(torch, name), op, number)
        outcome = comm.reduce_scatter_v(inputs[comm.rank], counts, op, algorithm=algorithm)
        whole, first = reduced(inputs, op), sum(counts[: comm.rank])
        expected = whole[first : first + counts[comm.rank]]
        check(comm, outcome, expected, [], (name, rest, algorithm, op, counts))
        digests.append(bits(whole))
    return digests


def exchange_uneven_rows(comm: Communicator) -> list[str]:
    """All-to-all; the digests are those of all rows together."""
    digests = []
    world, me = comm.size, comm.rank
    cases = [(name, [3], algorithm) for name, algorithm in product(UNREDUCED, choice.names("all_to_all"))]
    cases += [("float32", rest, "auto") for rest in RESTS]
    for number, (name, rest, algorithm) in enumerate(cases):
        rows = [rows_of(world, number + source) for source in range(world)]
        blocks = [
            [exact(s * world + d, [rows[s][d], *rest], torch.int16, "sum", number) for d in range(world)]
            for s in range(world)
        ]
        blocks = [[block.to(getattr(torch, name)) for block in row] for row in blocks]
        expected = torch.cat([blocks[source][me] for source in range(world)])
        incoming = [rows[source][me] for source in range(world)]
        tensor = torch.cat(blocks[me])
        outputs = incoming if (number + me) % 2 else None
        outcome = comm.all_to_all_v(tensor, rows[me], outputs, algorithm=algorithm)
        check(comm, outcome, expected, incoming, (name, rest, algorithm, rows))
        digests.append(bits(torch.cat([block for row in blocks for block in row])))
    return digests


def disagree_on_counts(comm: Communicator) -> list[str]:
    """Members whose counts contradict each other are all told so, and go on."""
    said: list[str] = []
    last = comm.size - 1
    if not last:
        return said
    odd = [2 if comm.rank == last else 1, *[1] * last]
    uneven = [comm.size - comm.rank, comm.rank, *[0] * (comm.size - 2)]
    attempts: tuple[Callable[[], object], ...] = (
        lambda: comm.all_to_all_v(torch.ones(comm.size), [1] * comm.size, odd),
        lambda: comm.all_gather_v(torch.ones(1), [1, *[2 if comm.rank == last else 1] * last][::-1]),
        lambda: comm.reduce_scatter_v(torch.ones(comm.size), uneven),
    )
    for attempt in attempts:
        try:
            attempt()
        except DescriptorMismatch as error:
            said.append(str(error))
    return said
