"""Coalesced and sparse collectives."""

from itertools import product

import torch
from torch import Tensor

from collectives import choice
from collectives.communicator import Communicator
from collectives.outcome import Outcome
from tests.conformance.operations.cases import ops_of
from tests.conformance.values import DTYPES, exact, laid_out, reduced
from tests.harness.peer import bits

MIXED: list[tuple[str, list[int], str]] = [
    ("float32", [7, 5], "contiguous"),
    ("bfloat16", [3], "contiguous"),
    ("float32", [], "leaf"),
    ("int32", [600], "strided"),
    ("float32", [0], "contiguous"),
    ("float32", [33, 2, 3], "transposed"),
    ("bfloat16", [2000], "strided"),
    ("float32", [90_001], "contiguous"),
]


def check(comm: Communicator, outcome: Outcome, expected: list[Tensor], case: object) -> list[str]:
    """A healthy group's outcome of several results; their digests."""
    assert len(outcome.results) == len(expected), case
    for result, want in zip(outcome.results, expected, strict=True):
        assert result.dtype == want.dtype, case
        assert result.shape == want.shape, case
        assert torch.equal(result, want), case
    assert (outcome.result, outcome.contributors, outcome.attempts) == (None, comm.members, 1), case
    return [bits(result) for result in outcome.results]


def reduce_lists(comm: Communicator) -> list[str]:
    """All-reduce of tensors of several dtypes and layouts, in one bucket and in many."""
    digests = []
    for number, (limit, op) in enumerate(product((1, 4000, 2**25), ("sum", "max"))):
        inputs = [
            [exact(r, shape, getattr(torch, name), op, number) for name, shape, _ in MIXED] for r in range(comm.size)
        ]
        tensors = [laid_out(one, layout) for one, (_, _, layout) in zip(inputs[comm.rank], MIXED, strict=True)]
        outcome = comm.all_reduce_coalesced(tensors, op, bucket_bytes=limit)
        expected = [reduced([mine[n] for mine in inputs], op) for n in range(len(MIXED))]
        digests += check(comm, outcome, expected, (limit, op))
        assert all(result is tensor for result, tensor in zip(outcome.results, tensors, strict=True))
    return digests


def gather_lists(comm: Communicator) -> list[str]:
    """All-gather of tensors of several dtypes and layouts."""
    digests = []
    for number, algorithm in enumerate(choice.names("all_gather")):
        inputs = [
            [exact(r, shape, getattr(torch, name), "sum", number) for name, shape, _ in MIXED] for r in range(comm.size)
        ]
        tensors = [laid_out(one, layout) for one, (_, _, layout) in zip(inputs[comm.rank], MIXED, strict=True)]
        expected = [torch.stack([mine[n] for mine in inputs]) for n in range(len(MIXED))]
        digests += check(comm, comm.all_gather_coalesced(tensors, algorithm=algorithm), expected, algorithm)
    return digests


def scatter_lists(comm: Communicator) -> list[str]:
    """Reduce-scatter of tensors of several dtypes; the digests are those of the wholes."""
    digests = []
    world, shapes = comm.size, [("float32", [2, 3]), ("int64", [1]), ("float32", [3, 501]), ("float16", [1, 7])]
    for number, algorithm in enumerate(choice.names("reduce_scatter")):
        inputs = [
            [exact(r, [world * rows, *rest], getattr(torch, name), "sum", number) for name, (rows, *rest) in shapes]
            for r in range(world)
        ]
        wholes = [reduced([mine[n] for mine in inputs], "sum") for n in range(len(shapes))]
        expected = [whole.chunk(world)[comm.rank] for whole in wholes]
        check(comm, comm.reduce_scatter_coalesced(inputs[comm.rank], algorithm=algorithm), expected, algorithm)
        digests += [bits(whole) for whole in wholes]
    return digests


def sparse_of(rank: int, number: int, dtype: torch.dtype, shape: list[int], rest: list[int]) -> tuple[Tensor, Tensor]:
    """Indices (dimensions, nnz), some of them twice, and values (nnz, *rest); rank 1 has none."""
    generator = torch.Generator().manual_seed(number * 101 + rank)
    entries = 0 if rank == 1 else 12 + 5 * rank
    indices = torch.stack([torch.randint(extent, (entries,), generator=generator) for extent in shape])
    return indices, exact(rank, [entries, *rest], dtype, "sum", number)


def reduce_sparse(comm: Communicator) -> list[str]:
    """All-reduce of sparse tensors and of pairs, against the sum of their dense forms."""
    digests = []
    kinds: list[tuple[list[int], list[int]]] = [([40], []), ([9, 7], []), ([20], [3, 2])]
    for number, (name, (shape, rest)) in enumerate(product(DTYPES, kinds)):
        dtype = getattr(torch, name)
        op = ("sum", "avg")[number % 2] if "avg" in ops_of(dtype) else "sum"
        given = [sparse_of(rank, number, dtype, shape, rest) for rank in range(comm.size)]
        wide = torch.float64 if dtype.is_floating_point else torch.int64
        dense = torch.zeros(*shape, *rest, dtype=wide)
        for indices, values in given:  # a member rounds what it adds up itself
            own = torch.zeros_like(dense).index_put_(tuple(indices), values.to(wide), accumulate=True)
            dense += own.to(dtype).to(wide)
        if op == "avg":
            dense = dense.to(torch.float64 if dtype == torch.float64 else torch.float32) / comm.size
        touched = torch.unique(torch.cat([indices for indices, _ in given], dim=1), dim=1)
        expected, case = dense[tuple(touched)].to(dtype), (name, shape, rest, op)
        indices, values = given[comm.rank]
        tensor = torch.sparse_coo_tensor(indices, values, (*shape, *rest), check_invariants=True)
        result = comm.all_reduce_sparse(tensor, op).result
        assert result is not None
        assert result.is_coalesced(), case
        assert result.shape == tensor.shape, case
        assert torch.equal(result.indices(), touched), case
        assert torch.equal(result.values(), expected), case
        if len(shape) == 1:
            outcome = comm.all_reduce_sparse((indices[0], values), op)
            digests += check(comm, outcome, [touched[0], expected], case)
        digests.append(bits(result.values()))
    return digests


def reduce_sparse_roughly(comm: Communicator) -> list[str]:
    """Sums that depend on their order: the same bits at every run and on every member."""
    digests: list[str] = []
    for name in ("float32", "float16"):
        generator = torch.Generator().manual_seed(comm.rank)
        indices = torch.randint(500, (3000,), generator=generator)
        values = torch.randn(3000, 5, generator=generator).to(getattr(torch, name))
        found = set()
        for _ in range(2):
            outcome = comm.all_reduce_sparse((indices, values), "avg")
            found.add(tuple(bits(result) for result in outcome.results))
        assert len(found) == 1, name
        digests += found.pop()
    return digests
