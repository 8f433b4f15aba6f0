"""A rank of `benchmarks.attention`: attention with real computation, in turns with one process' own.

Started by the benchmark through `launch.bench_host.Company`; its orders come on stdin, its figures go back as reports.
"""

import queue
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from launch.child import Link


def main() -> int:
    """Wait for the order, measure, report."""
    link = Link.enter()
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    link.listen(orders.put)
    order = orders.get()
    import torch

    from collectives.communicator import Communicator
    from collectives.options import Options

    torch.set_num_threads(1)
    options = Options.resolve({"heartbeat_timeout": 30.0, "topology": order["topology"], "op_timeout": 300.0})
    with Communicator.join(order["address"], "attention", order["token"], order["transport"], options) as comm:
        from benchmarks import weaving_rank

        measures: dict[str, Callable[..., dict[str, Any]]] = {
            "attention": attention,
            "weave": weaving_rank.computed,
            "weave modelled": weaving_rank.modelled,
        }
        found = measures[order["what"]](comm, **order["given"])
    link.report("figures", **found)
    return 0


def attention(comm: Any, length: int, heads: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of the ranks together, and of rank 0 alone; and what memory they took at most."""
    import torch
    from torch.nn import functional as F

    from parallel.attention import sequence_attention
    from parallel.attention.shares import Balance

    balance = Balance()

    def given(rows: int) -> list[torch.Tensor]:
        return [torch.randn(1, heads, rows, 64, requires_grad=number < 3) for number in range(4)]

    base = peak()
    mine = [tensor.detach() for tensor in given(balance.shares(length, comm.size)[comm.rank].rows)]

    def together() -> None:
        q, k, v = (tensor.clone().requires_grad_() for tensor in mine[:3])
        out = sequence_attention(q, k, v, comm, scheme="ring", parts=8)
        out.backward(mine[3])  # type: ignore[no-untyped-call]

    ours = timed(comm, together, rounds)
    used = peak() - base
    alone, used_alone = 0.0, 0
    if comm.rank == 0:
        base = peak()
        q, k, v, grad = given(length)
        begun = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v).backward(grad)  # type: ignore[no-untyped-call]
        alone, used_alone = time.perf_counter() - begun, peak() - base + used
    comm.barrier()
    return {"rank": comm.rank, "ours": ours, "alone": alone, "used": used, "used_alone": used_alone}


def timed(comm: Any, act: Callable[[], object], rounds: int) -> float:
    """Median seconds, from when all begin."""
    taken = []
    for _ in range(rounds):
        comm.barrier()
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def peak() -> int:
    """Most memory that this process had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
