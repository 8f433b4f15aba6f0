"""All ranks of a problem in one process, step by step as the schedule says: the plainest engine there is.

It keeps the rules of `collectives.schedule` literally (every step reads what the earlier ones left), so what it
computes is what the schedule means; tests with processes show that the real engine does the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.region import Ranges
from collectives.schedule import Schedule
from parallel.attention.kernels import Binder
from parallel.attention.layout import Problem, layout
from parallel.attention.shares import Balance, Run, Share, unshard


def played(schedule: Schedule, sources: list[Tensor], kernels: list[dict[str, object]]) -> list[Tensor]:
    """Run a schedule; the wanted bytes of each rank."""
    buffers = [torch.full((schedule.count,), 0xAB, dtype=torch.uint8) for _ in sources]
    for rank, source in enumerate(sources):
        at = 0
        for start, stop in schedule.held(rank):
            buffers[rank][start:stop] = source[at : at + stop - start]
            at += stop - start
    for index in range(len(schedule)):
        step = schedule.step(index)
        columns = (step.src.tolist(), step.dst.tolist(), step.start.tolist(), step.stop.tolist())
        moving = [(dst, lo, hi, buffers[src][lo:hi].clone()) for src, dst, lo, hi in zip(*columns, strict=True)]
        work = step.computes
        for row in range(len(work.rank)):
            rank, name = int(work.rank[row]), schedule.kernels[work.kernel[row]]
            reads, writes = work.operands_of(row)
            spans: Ranges = ((int(work.start[row]), int(work.stop[row])), *writes, *reads)
            kernel = kernels[rank][name]
            kernel(*(buffers[rank][start:stop] for start, stop in spans))  # type: ignore[operator]
        for dst, start, stop, data in moving:
            buffers[dst][start:stop] = data
    return [
        torch.cat(
            [*(buffers[rank][start:stop] for start, stop in schedule.wanted(rank)), torch.empty(0, dtype=torch.uint8)]
        )
        for rank in range(len(sources))
    ]


def solve(
    problem: Problem, q: list[Tensor], kv: list[tuple[Tensor, Tensor]], grads: list[Tensor]
) -> list[list[Tensor]]:
    """By rank: out, lse, and the gradients of q, k and v."""
    world = range(problem.world)
    plan = layout(problem)
    binders = [Binder(plan, rank) for rank in world]
    lines = played(
        plan.schedule,
        [binders[rank].source((q[rank],), kv[rank]) for rank in world],
        [dict(binder.kernels) for binder in binders],
    )
    found = [binders[rank].results(lines[rank]) for rank in world]
    back = layout(problem, backward=True)
    binders = [Binder(back, rank) for rank in world]
    outs = [out.to(problem.dtype) for out, _ in found]
    sources = [binders[r].source((q[r], grads[r], outs[r], found[r][1]), kv[r]) for r in world]
    lines = played(back.schedule, sources, [dict(binder.kernels) for binder in binders])
    for rank in world:
        found[rank] += binders[rank].results(lines[rank])
    return found


def replicated(rows: int, world: int) -> tuple[Share, ...]:
    """The same rows on every rank."""
    return tuple(Share((Run(0, rows, 0, 1, 0),), (rows,)) for _ in range(world))


def reference(given: Sequence[Tensor], causal: bool, scale: float, documents: tuple[int, ...] = ()) -> list[Tensor]:
    """Out and gradients by torch, in one piece, of q, k, v and a gradient of the output."""
    *operands, grad = given
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in operands)
    mask = None
    if documents:
        number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        mask = number[:, None] == number[None, :]
        if causal:
            mask &= torch.ones_like(mask).tril()
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=True
    )
    out.backward(grad)  # type: ignore[no-untyped-call]
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]


def whole(found: list[list[Tensor]], queries: Balance, keys: Balance) -> list[Tensor]:
    """Out and gradients of the whole sequence, of all ranks' parts."""
    sides = (queries, queries, keys, keys)
    return [unshard([mine[number] for mine in found], side) for number, side in zip((0, 2, 3, 4), sides, strict=True)]
