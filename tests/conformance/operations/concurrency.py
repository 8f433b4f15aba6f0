"""Many operations under way, and what happens to those that use the same memory."""

import threading

import torch
from torch import Tensor

from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import UsageError
from tests.conformance.operations.cases import check, contributions
from tests.conformance.values import reduced


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


def clash(comm: Communicator) -> list[str]:
    """Calls on memory that another one under way writes are refused, whatever the lane; then the group goes on."""
    said = []
    shared, apart = torch.ones(900_000), torch.ones(10, 10)
    held = comm.all_reduce(shared, async_op=True, lane="queue") if comm.rank else None
    if held is not None:
        for refused in (
            lambda: comm.all_gather(shared[5:9], lane="other"),
            lambda: comm.all_reduce(torch.ones(4), out=shared[:4]),
            lambda: comm.all_reduce(shared, async_op=True, lane="queue"),
            lambda: comm.broadcast(shared, comm.members[0]),
        ):
            try:
                refused()
            except UsageError as error:
                said.append(str(error))
    held = held or comm.all_reduce(shared, async_op=True, lane="queue")
    held.wait()
    works = [comm.all_reduce(apart[:, 0], async_op=True), comm.all_reduce(apart[:, 1], async_op=True, lane="queue")]
    works += [comm.all_gather(apart[:, 2], async_op=True, lane=lane) for lane in ("main", "queue")]
    works += [comm.all_reduce(apart[:, 3], async_op=True, snapshot=True, inplace=False)]
    comm.all_reduce(apart[:, 4])
    assert all(work.wait().contributors == comm.members for work in works)
    comm.all_reduce(shared)
    return said
