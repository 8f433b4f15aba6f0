"""What the members do in `test_operations`: every function runs on all of them in lockstep and returns digests.

A function checks its own member's results against `values` and returns the digest of each, in order, so that the test
can compare the members with each other.
"""

import threading
import time
from itertools import product
from typing import Any

import torch
from torch import Tensor

from collectives import faults
from collectives.algorithms import bidirectional, doubling, ring
from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.outcome import Outcome
from collectives.region import split
from tests.conformance.values import DTYPES, HALF, OPS, exact, laid_out, reduced, rough
from tests.harness.peer import bits

SHAPES: list[list[int]] = [[], [0], [3, 0], [1], [2], [3], [7, 5], [33, 2, 3], [1023]]
LAYOUTS = ("contiguous", "strided", "transposed", "leaf")
RINGS = ("auto", "ring", "bidirectional")
UNREDUCED = (*DTYPES, "bool", "complex64")
"""Dtypes that can be moved, if not all of them be reduced."""


def ops_of(dtype: torch.dtype) -> tuple[str, ...]:
    """The reduce ops of a dtype: there is no avg of integers."""
    return OPS if dtype.is_floating_point else tuple(op for op in OPS if op != "avg")


def contributions(comm: Communicator, shape: list[int], dtype: torch.dtype, op: str, seed: int) -> list[Tensor]:
    """Exact inputs of all members, by rank."""
    return [exact(rank, shape, dtype, op, seed) for rank in range(comm.size)]


def check(comm: Communicator, outcome: Outcome, expected: Tensor, case: Any) -> str:
    """A healthy group's outcome with these bits; returns their digest."""
    result = outcome.result
    assert result is not None, case
    assert result.dtype == expected.dtype, case
    assert result.shape == expected.shape, (case, result.shape)
    assert torch.equal(result, expected), (case, result, expected)
    assert outcome == Outcome(result, comm.members, comm.epoch, 1, False), (case, outcome)
    return bits(result)


def reduce_everything(comm: Communicator) -> list[str]:
    """All-reduce of all dtypes, ops and algorithms."""
    digests = []
    for number, (name, shape) in enumerate(product(DTYPES, ([17], [2500]))):
        dtype = getattr(torch, name)
        for op, algorithm in product(ops_of(dtype), ("ring", "bidirectional", "doubling")):
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
        for algorithm in ("ring", "bidirectional", "doubling"):
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
    for name, algorithm, count in (
        ("float32", "auto", 2 * large),
        ("bfloat16", "bidirectional", 2 * large),
        ("float32", "doubling", large),
    ):
        inputs = contributions(comm, [count], getattr(torch, name), "avg", 3)
        outcome = comm.all_reduce(inputs[comm.rank], "avg", inplace=False, algorithm=algorithm)
        digests.append(check(comm, outcome, reduced(inputs, "avg"), (name, algorithm)))
    return digests


def reduce_roughly(comm: Communicator) -> list[str]:
    """Random numbers: near to double precision, and the same bits at every run."""
    digests = []
    for name, op in product(("float32", "float64", "float16", "bfloat16"), OPS):
        dtype = getattr(torch, name)
        inputs = [rough(rank, [20_001], dtype, 5) for rank in range(comm.size)]
        expected = reduced([one.to(torch.float64) for one in inputs], op)
        step = torch.finfo(dtype).eps * (1 if dtype in HALF else comm.size)
        for algorithm in ("auto", "bidirectional", "doubling"):
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
    for name, algorithm in product(DTYPES, ("ring", "bidirectional")):
        cases += [(name, [3], op, algorithm, "contiguous") for op in ops_of(getattr(torch, name))]
    for rest, algorithm, layout in product(([], [0], [501, 3]), RINGS, ("contiguous", "transposed", "leaf")):
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


def gather_rows(comm: Communicator) -> list[str]:
    """All-gather of dtypes that can be reduced and others, with and without an output."""
    cases = [(name, [7, 5], algorithm, "contiguous") for name, algorithm in product(UNREDUCED, RINGS[1:])]
    cases += [("float32", shape, "auto", layout) for shape, layout in product(SHAPES, LAYOUTS)]
    cases += [("bool", [300_001], "auto", "contiguous"), ("float32", [300_001], "bidirectional", "strided")]
    digests = []
    for number, (name, shape, algorithm, layout) in enumerate(cases):
        if layout in ("strided", "transposed") and not shape:
            continue
        inputs = [exact(rank, shape, torch.int16, "sum", number).to(getattr(torch, name)) for rank in range(comm.size)]
        expected = torch.stack(inputs)
        tensor = laid_out(inputs[comm.rank], layout)
        case = (name, shape, algorithm, layout)
        digests.append(check(comm, comm.all_gather(tensor, algorithm=algorithm), expected, case))
        out = laid_out(torch.zeros_like(expected), "strided" if shape else "contiguous")
        outcome = comm.all_gather(tensor, out=out, algorithm=algorithm)
        digests.append(check(comm, outcome, expected, case))
        assert outcome.result is out
        assert torch.equal(tensor, inputs[comm.rank])
    return digests


def broadcast_from_each(comm: Communicator) -> list[str]:
    """Broadcast from each member: all dtypes, shapes and layouts in turn."""
    digests = []
    for number, (name, root) in enumerate(product((*UNREDUCED, *UNREDUCED), range(comm.size))):
        shape = [*SHAPES, [700_001]][number % (len(SHAPES) + 1)]
        algorithm, layout = RINGS[number % 3], LAYOUTS[number % 4]
        dtype = getattr(torch, name)
        if (layout in ("strided", "transposed") and not shape) or (layout == "leaf" and not dtype.is_floating_point):
            layout = "contiguous"
        inputs = [exact(rank, shape, torch.int16, "sum", number).to(dtype) for rank in range(comm.size)]
        tensor = laid_out(inputs[comm.rank], layout)
        outcome = comm.broadcast(tensor, comm.members[root], algorithm=algorithm)
        digests.append(check(comm, outcome, inputs[root], (name, shape, root, algorithm, layout)))
        assert outcome.result is tensor
    return digests


def barriers(comm: Communicator) -> list[list[float]]:
    """When this member entered each barrier and when it returned, on the clock of the machine."""
    rows = []
    for number in range(20):
        if number % max(1, comm.size) == comm.rank:
            time.sleep(0.01)
        entered = time.monotonic()
        outcome = comm.barrier()
        rows.append([entered, time.monotonic()])
        assert outcome == Outcome(None, comm.members, comm.epoch, 1, False)
    return rows


def run_schedules(comm: Communicator) -> list[str]:
    """Any schedule, on a flat buffer: those of the algorithms here, and one made by hand."""
    digests = []
    world = comm.size
    for count in (1, 11, 30_000):
        inputs = contributions(comm, [count], torch.float64, "sum", count)
        for module in (ring, bidirectional, doubling):
            tensor = inputs[comm.rank].clone()
            outcome = comm.run(module.all_reduce(world, count, finish=True), tensor, kernels={"finish": torch.neg_})
            digests.append(check(comm, outcome, -reduced(inputs, "sum"), (count, module.__name__)))
            assert outcome.result is tensor
        # Only the wanted range is written.
        start, stop = split(count, world)[comm.rank]
        tensor = inputs[comm.rank].clone()
        comm.run(ring.reduce_scatter(world, count), tensor, op="max")
        expected = inputs[comm.rank].clone()
        expected[start:stop] = reduced(inputs, "max")[start:stop]
        assert torch.equal(tensor, expected), count
        comm.run(ring.all_gather(world, count), tensor)
        assert torch.equal(tensor, reduced(inputs, "max")), count
    return digests


def overlap(comm: Communicator) -> list[str]:
    """Many operations under way: queued on one lane, on several lanes by several threads, with snapshots."""
    works, expected = [], []
    for number in range(12):
        inputs = contributions(comm, [number * 977 + 1], torch.float32, "sum", number)
        tensor = inputs[comm.rank].clone()
        works.append(comm.all_reduce(tensor, async_op=True, snapshot=True, inplace=False, lane=f"queue {number % 3}"))
        tensor.zero_()  # allowed: there is a snapshot
        expected.append(reduced(inputs, "sum"))
    digests = [
        check(comm, work.wait(), want, number) for number, (work, want) in enumerate(zip(works, expected, strict=True))
    ]
    assert all(work.is_completed() for work in works)
    found: dict[int, list[str]] = {}

    def use_lane(lane: int) -> None:
        mine = []
        for number in range(8):
            inputs = contributions(comm, [number * 3001 + lane], torch.int32, "sum", number)
            outcome = comm.all_reduce(inputs[comm.rank], lane=f"thread {lane}", inplace=False)
            mine.append(check(comm, outcome, reduced(inputs, "sum"), (lane, number)))
            comm.barrier(lane=f"thread {lane}")
        found[lane] = mine

    threads = [threading.Thread(target=use_lane, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4, "a thread failed"
    # Blocking behind what is queued.
    order: list[Tensor] = [torch.ones(1) for _ in range(5)]
    for tensor in order[:-1]:
        comm.all_reduce(tensor, async_op=True)
    comm.all_reduce(order[-1])
    assert all(tensor.item() == comm.size for tensor in order)
    return digests + [digest for lane in sorted(found) for digest in found[lane]]


def meddle(comm: Communicator) -> str:
    """With `check_inputs`: change an input while its operation is under way; returns what the complaint says."""
    tensor, hashed = torch.ones(3), threading.Event()
    if comm.rank == 0:
        faults.arm("enter", lambda _: hashed.set())
        work = comm.all_reduce(tensor, inplace=False, async_op=True)
        assert hashed.wait(60)
        tensor.zero_()  # the others have not entered yet
        comm.barrier(lane="gate")
    else:
        comm.barrier(lane="gate")
        work = comm.all_reduce(tensor, inplace=False, async_op=True)
    try:
        work.wait()
    except UsageError as error:
        said = str(error)
    else:
        said = ""
    comm.barrier()
    return said
