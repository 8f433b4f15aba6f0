"""What the members of a group do in the tests of attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from collectives.errors import DescriptorMismatch, MemberLost
from parallel.attention import sequence_attention
from parallel.attention.shares import Balance, shard, unshard
from tests.harness.peer import Peer


def tensors(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, v and a gradient of the output, the same on all ranks. Sizes: heads, heads of keys, queries, keys."""
    heads, kv_heads, queries, keys = sizes
    chance = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8), (2, heads, queries, 8)]
    return [torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(given: Sequence[Tensor], causal: bool) -> list[Tensor]:
    """Out and gradients, by one process, of q, k, v and a gradient of the output."""
    q, k, v, grad = given
    q, k, v = (tensor.clone().requires_grad_() for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def errors(comm: Communicator, cases: list[dict[str, Any]]) -> list[float]:
    """The largest difference between this rank's rows and those of one process, for each case."""
    found = []
    for case in cases:
        balance, scheme, causal = Balance(case["balance"]), case["scheme"], case["causal"]
        whole = tensors(case["sizes"], torch.float64, case["seed"])
        reference = expected(whole, causal)
        every = scheme == "tree"

        def mine(tensor: Tensor, queries: bool, balance: Balance = balance, every: bool = every) -> Tensor:
            return tensor if every and queries else shard(tensor, balance, comm.size, comm.rank)

        q, k, v, grad = (mine(tensor, number in (0, 3)) for number, tensor in enumerate(whole))
        q, k, v = (tensor.clone().requires_grad_() for tensor in (q, k, v))
        out = sequence_attention(q, k, v, comm, causal, scheme, balance, **case["settings"])
        got = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
        due = [mine(tensor, number < 2) for number, tensor in enumerate(reference)]
        found.append(max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(got, due, strict=True)))
    return found


class _Spread(torch.autograd.Function):
    """Attention of whole tensors, which all ranks give alike, computed by the ranks together; so are the gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, comm: Communicator, case: dict[str, Any]) -> Tensor:
        balance = Balance(case["balance"])
        ctx.place = comm, balance
        ctx.mine = [shard(tensor.detach(), balance, comm.size, comm.rank).requires_grad_() for tensor in (q, k, v)]
        with torch.enable_grad():
            q, k, v = ctx.mine
            ctx.out = sequence_attention(q, k, v, comm, case["causal"], case["scheme"], balance, **case["settings"])
        return _together(ctx.out.detach(), comm, balance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        comm, balance = ctx.place
        part = shard(grad, balance, comm.size, comm.rank)
        found = torch.autograd.grad(ctx.out, ctx.mine, part, retain_graph=True)
        return *(_together(tensor, comm, balance) for tensor in found), None, None


def _together(part: Tensor, comm: Communicator, balance: Balance) -> Tensor:
    """The whole of what each rank has equally many rows of."""
    parts = comm.all_gather(part.contiguous(), out=part.new_empty(comm.size, *part.shape)).result
    assert parts is not None
    return unshard(list(parts), balance)


def gradchecked(comm: Communicator, case: dict[str, Any]) -> bool:
    """Finite differences against the gradients; all ranks change the same element of the whole at the same time."""
    chance = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(1, heads, 4 * comm.size, 2, generator=chance, dtype=torch.float64).requires_grad_()
        for heads in (2, 1, 1)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Spread.apply(q, k, v, comm, case)  # type: ignore[no-untyped-call]
        return out

    return torch.autograd.gradcheck(attend, (q, k, v), check_undefined_grad=False, atol=1e-7, rtol=1e-6)


def sent(comm: Communicator, cases: list[dict[str, Any]]) -> list[list[int]]:
    """Bytes that this rank sends, forward and backward, for each case."""
    found = []
    for case in cases:
        balance = Balance(case["balance"])
        q, k, v, grad = (shard(t, balance, comm.size, comm.rank) for t in tensors(case["sizes"], torch.float32, 1))
        rows = tuple(share.rows for share in balance.shares(case["sizes"][2], comm.size))
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        begun = comm.meter.total
        out = sequence_attention(
            q, k, v, comm, case["causal"], case["scheme"], balance, lengths=(rows, rows), **case["settings"]
        )
        middle = comm.meter.total
        out.backward(grad)  # type: ignore[no-untyped-call]
        found.append([middle - begun, comm.meter.total - middle])
    return found


def refused(comm: Communicator, rows: list[int], settings: dict[str, Any]) -> str:
    """What a call is refused with, where each rank has so many rows."""
    q = torch.zeros(1, 2, rows[comm.rank], 4)
    try:
        sequence_attention(q, q, q, comm, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagrees(comm: Communicator, cases: list[dict[str, Any]]) -> list[str]:
    """What members are told of which rank 0 calls with a dtype and settings of its own."""
    said = []
    for case in cases:
        dtype = getattr(torch, case.pop("dtype")) if comm.rank == 0 else torch.float16
        q = torch.zeros(1, 4, 2, 4, dtype=dtype)
        q = q.view(case.pop("shape")) if comm.rank == 0 else q
        try:
            sequence_attention(q, q, q, comm, scheme="ring", **(case if comm.rank == 0 else {}))
        except DescriptorMismatch as error:
            said.append(str(error))
    return said


def loses_one(peer: Peer, length: int) -> dict[str, Any]:
    """Attend again and again until a member is lost, then once more among those that are left."""
    whole = tensors((4, 2, length, length), torch.float64, 3)
    reference = expected(whole, True)
    balance = Balance("zigzag")

    def attend(comm: Communicator) -> float:
        q, k, v, grad = (shard(tensor, balance, comm.size, comm.rank) for tensor in whole)
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        out = sequence_attention(q, k, v, comm, True, "token_ring", balance)
        got = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
        due = [shard(tensor, balance, comm.size, comm.rank) for tensor in reference]
        return max(float((a - b).abs().max()) for a, b in zip(got, due, strict=True))

    with peer.join() as comm:
        worst, before, lost = attend(comm), comm.size, ""
        peer.say("attending", rank=comm.rank)
        while not lost:
            try:
                worst = max(worst, attend(comm))
            except MemberLost as error:
                lost = type(error).__name__
        comm.resume_all()
        return {"before": before, "after": comm.size, "worst": max(worst, attend(comm)), "lost": lost}
