"""A rank of `benchmarks.attention`: attention with real computation, of several ranks or of one process.

Started by the benchmark through `launch.bench_host.Company`; its orders come on stdin, its figures go back as reports.
"""

import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collectives.region import split
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


def attention(comm: Any, length: int, heads: int, scheme: str) -> dict[str, Any]:
    """Forward and backward once, of one process by torch's function: seconds, processor seconds, bytes at most."""
    import torch
    from torch.nn import functional as F

    from parallel.attention import sequence_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if comm.size == 1:
            return F.scaled_dot_product_attention(q, k, v)
        return sequence_attention(q, k, v, comm, scheme=scheme)

    def given(rows: int) -> list[torch.Tensor]:
        share = split(rows, comm.size)[comm.rank]
        return [torch.randn(1, heads, share[1] - share[0], 64, requires_grad=number < 3) for number in range(4)]

    q, k, v, grad = given(64 * comm.size)
    attend(q, k, v).backward(grad)  # type: ignore[no-untyped-call]
    q = k = v = grad = torch.empty(0)
    comm.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    q, k, v, grad = given(length)
    comm.barrier()
    begun, worked = time.perf_counter(), time.process_time()
    attend(q, k, v).backward(grad)  # type: ignore[no-untyped-call]
    took, worked = time.perf_counter() - begun, time.process_time() - worked
    used = _resident("VmHWM") - before
    comm.barrier()
    return {"rank": comm.rank, "seconds": took, "processor": worked, "used": used}


def _resident(field: str) -> int:
    """Bytes of memory of this process, by a field of its status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    sys.exit(main())
