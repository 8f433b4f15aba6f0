"""Gathers, scatters, broadcasts, all-to-all, barriers, and any schedule."""

import time
from itertools import product

import torch

from collectives import choice
from collectives.algorithms import bidirectional, doubling, ring
from collectives.communicator import Communicator
from collectives.outcome import Outcome
from collectives.region import split
from tests.conformance.operations.cases import LAYOUTS, SHAPES, UNREDUCED, check, check_nothing, contributions, moved
from tests.conformance.values import laid_out, reduced
from tests.harness.peer import bits

BROADCASTS = ("auto", *choice.names("broadcast"))


def gather_rows(comm: Communicator) -> list[str]:
    """All-gather of dtypes that can be reduced and others, with and without an output."""
    cases = [
        (name, [7, 5], algorithm, "contiguous") for name, algorithm in product(UNREDUCED, choice.names("all_gather"))
    ]
    cases += [("float32", shape, "auto", layout) for shape, layout in product(SHAPES, LAYOUTS)]
    cases += [("bool", [300_001], "auto", "contiguous"), ("float32", [300_001], "bidirectional", "strided")]
    digests = []
    for number, (name, shape, algorithm, layout) in enumerate(cases):
        if layout in ("strided", "transposed") and not shape:
            continue
        inputs = moved(comm, shape, name, number)
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
        shape = [*SHAPES, [180_001]][number % (len(SHAPES) + 1)]
        algorithm, layout = BROADCASTS[number % len(BROADCASTS)], LAYOUTS[number % 4]
        dtype = getattr(torch, name)
        if (layout in ("strided", "transposed") and not shape) or (layout == "leaf" and not dtype.is_floating_point):
            layout = "contiguous"
        inputs = moved(comm, shape, name, number)
        tensor = laid_out(inputs[comm.rank], layout)
        outcome = comm.broadcast(tensor, comm.members[root], algorithm=algorithm)
        digests.append(check(comm, outcome, inputs[root], (name, shape, root, algorithm, layout)))
        assert outcome.result is tensor
    return digests


def gather_to_and_scatter_from_each(comm: Communicator) -> list[str]:
    """Gather rows at each member in turn, and scatter them from there."""
    digests = []
    cases = enumerate(product(UNREDUCED, ("auto", *choice.names("gather"))))
    for number, (name, algorithm) in cases:
        root, shape = number % comm.size, [*SHAPES, [200_001]][number % (len(SHAPES) + 1)]
        inputs, case = moved(comm, shape, name, number), (name, algorithm, root, shape)
        whole = torch.stack(inputs)
        outcome = comm.gather(inputs[comm.rank], comm.members[root], algorithm=algorithm)
        if comm.rank == root:
            check(comm, outcome, whole, case)
        else:
            check_nothing(comm, outcome, case)
        layout = "strided" if shape else "contiguous"
        tensor = laid_out(torch.zeros_like(inputs[0]), layout)
        rows = laid_out(whole, layout) if comm.rank == root else None
        outcome = comm.scatter(tensor, comm.members[root], rows, algorithm=algorithm, snapshot=number % 2 == 1)
        check(comm, outcome, inputs[comm.rank], case)
        assert outcome.result is tensor, case
        digests.append(bits(whole))
    return digests


def exchange_blocks(comm: Communicator) -> list[str]:
    """All-to-all; the digests are those of all blocks together."""
    digests = []
    rests: list[list[int]] = [[], [0], [3], [1001, 3], [30_001]]
    cases = [(name, [3], algorithm) for name, algorithm in product(UNREDUCED, choice.names("all_to_all"))]
    cases += [("float32", rest, algorithm) for rest, algorithm in product(rests, ("auto", *choice.names("all_to_all")))]
    for number, (name, rest, algorithm) in enumerate(cases):
        inputs = moved(comm, [2 * comm.size, *rest], name, number)
        expected = torch.cat([whole[2 * comm.rank : 2 * comm.rank + 2] for whole in inputs])
        tensor = laid_out(inputs[comm.rank], "transposed" if number % 3 == 0 else "contiguous")
        check(comm, comm.all_to_all(tensor, algorithm=algorithm), expected, (name, rest, algorithm))
        assert torch.equal(tensor, inputs[comm.rank])
        digests.append(bits(torch.stack(inputs)))
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
