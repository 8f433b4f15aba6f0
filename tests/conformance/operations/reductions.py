"""All-reduce, reduce and reduce-scatter."""

from itertools import product

import torch

from collectives import choice
from collectives.communicator import Communicator
from tests.conformance.operations.cases import LAYOUTS, SHAPES, check, check_nothing, contributions, ops_of
from tests.conformance.values import DTYPES, HALF, OPS, laid_out, reduced, rough
from tests.harness.peer import bits

ALL_REDUCES = ("auto", *choice.names("all_reduce"))


def reduce_everything(comm: Communicator) -> list[str]:
    """All-reduce of all dtypes, ops and algorithms."""
    digests = []
    for number, name in enumerate(DTYPES):
        dtype = getattr(torch, name)
        for turn, (op, algorithm) in enumerate(product(ops_of(dtype), choice.names("all_reduce"))):
            shape = [(17, 2500)[(number + turn) % 2]]
            inputs = contributions(comm, shape, dtype, op, number)
            tensor = inputs[comm.rank].clone()
            outcome = comm.all_reduce(tensor, op, algorithm=algorithm)
            digests.append(check(comm, outcome, reduced(inputs, op), (name, shape, op, algorithm)))
            assert outcome.result is tensor
    return digests


def reduce_every_shape(comm: Communicator) -> list[str]:
    """All shapes and layouts; in place, to a new tensor and to `out`."""
    digests = []
    for number, (shape, layout) in enumerate(product(SHAPES, LAYOUTS)):
        name = ("float32", "bfloat16", "int64")[number % (2 if layout == "leaf" else 3)]
        if layout in ("strided", "transposed") and not shape:
            continue
        inputs = contributions(comm, shape, getattr(torch, name), "sum", number)
        expected = reduced(inputs, "sum")
        for turn in range(2):
            algorithm = ALL_REDUCES[(2 * number + turn) % len(ALL_REDUCES)]
            case = (shape, layout, name, algorithm)
            tensor = laid_out(inputs[comm.rank], layout)
            outcome = comm.all_reduce(tensor, inplace=False, algorithm=algorithm)
            digests.append(check(comm, outcome, expected, case))
            assert torch.equal(tensor, inputs[comm.rank]), case
            out = torch.full_like(expected, 7)
            outcome = comm.all_reduce(tensor, out=laid_out(out, layout), algorithm=algorithm)
            digests.append(check(comm, outcome, expected, case))
            assert torch.equal(tensor, inputs[comm.rank]), case
            outcome = comm.all_reduce(tensor, algorithm=algorithm)
            digests.append(check(comm, outcome, expected, case))
            assert outcome.result is tensor, case
            assert tensor.requires_grad == (layout == "leaf"), case
    return digests


def reduce_segments(comm: Communicator) -> list[str]:
    """Tensors of several segments a chunk, of odd length."""
    digests = []
    large = comm.size * 2**18 + 1
    some = [ALL_REDUCES[(comm.size + turn) % len(ALL_REDUCES)] for turn in range(3)]
    for turn, algorithm in enumerate(("ring", *some)):
        name, count = ("float32", "bfloat16")[turn % 2], large * (2 if turn == 0 else 1)
        inputs = contributions(comm, [count], getattr(torch, name), "avg", 3)
        outcome = comm.all_reduce(inputs[comm.rank], "avg", inplace=False, algorithm=algorithm)
        digests.append(check(comm, outcome, reduced(inputs, "avg"), (name, algorithm)))
    return digests


def reduce_roughly(comm: Communicator) -> list[str]:
    """Random numbers: near to double precision, and the same bits at every run."""
    digests = []
    for number, (name, op) in enumerate(product(("float32", "float64", "float16", "bfloat16"), OPS)):
        dtype = getattr(torch, name)
        inputs = [rough(rank, [20_001], dtype, 5) for rank in range(comm.size)]
        expected = reduced([one.to(torch.float64) for one in inputs], op)
        step = torch.finfo(dtype).eps * (1 if dtype in HALF else comm.size)
        for algorithm in [ALL_REDUCES[(number + turn) % len(ALL_REDUCES)] for turn in (0, 3, 5)]:
            found = []
            for _ in range(2 if op == "sum" else 1):
                result = comm.all_reduce(inputs[comm.rank], op, inplace=False, algorithm=algorithm).result
                assert result is not None
                torch.testing.assert_close(result.to(torch.float64), expected, rtol=step, atol=8 * min(step, 2**-21))
                found.append(bits(result))
            assert len(set(found)) == 1, (name, op, algorithm)
            digests.append(found[0])
    return digests


def scatter_reductions(comm: Communicator) -> list[str]:
    """Reduce-scatter; the digests are those of the whole that the shares are cut from."""
    cases: list[tuple[str, list[int], str, str, str]] = []
    for name, algorithm in product(DTYPES, choice.names("reduce_scatter")):
        ops = ops_of(getattr(torch, name))
        cases += [(name, [3], op, algorithm, "contiguous") for op in ops[len(cases) % 2 :: 2]]
    for rest, algorithm, layout in product(
        ([], [0], [501, 3]), ("auto", "ring", "direct"), ("contiguous", "transposed", "leaf")
    ):
        cases += [("float32", rest, "avg", algorithm, layout)]
    cases += [(name, [150_001], "avg", "auto", "contiguous") for name in ("float32", "float16")]
    digests = []
    for number, (name, rest, op, algorithm, layout) in enumerate(cases):
        inputs = contributions(comm, [2 * comm.size, *rest], getattr(torch, name), op, number)
        whole = reduced(inputs, op)
        tensor = laid_out(inputs[comm.rank], layout)
        outcome = comm.reduce_scatter(tensor, op, algorithm=algorithm)
        check(comm, outcome, whole[2 * comm.rank : 2 * comm.rank + 2], (name, rest, op, algorithm, layout))
        assert torch.equal(tensor, inputs[comm.rank])
        digests.append(bits(whole))
    return digests


def reduce_to_each(comm: Communicator) -> list[str]:
    """Reduce to each member in turn; the digests are those of the result that the root alone has."""
    digests = []
    for number, (name, algorithm) in enumerate(product(DTYPES, ("auto", *choice.names("reduce")))):
        dtype = getattr(torch, name)
        root, op = number % comm.size, ops_of(dtype)[number % len(ops_of(dtype))]
        shape = [*SHAPES, [300_001]][number % (len(SHAPES) + 1)]
        inputs = contributions(comm, shape, dtype, op, number)
        expected, case = reduced(inputs, op), (name, algorithm, op, root, shape)
        for inplace in (True, False):
            tensor = inputs[comm.rank].clone()
            outcome = comm.reduce(tensor, comm.members[root], op, inplace=inplace, algorithm=algorithm)
            if comm.rank == root:
                check(comm, outcome, expected, case)
                assert (outcome.result is tensor) == inplace, case
            else:
                check_nothing(comm, outcome, case)
            assert torch.equal(tensor, inputs[comm.rank]) or (comm.rank == root and inplace), case
        digests.append(bits(expected))
    return digests
