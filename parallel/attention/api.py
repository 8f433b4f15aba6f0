"""Attention over a sequence that is spread over the members of a communicator: the function and the module.

    out = sequence_attention(q, k, v, comm, causal=True, scheme="token_ring", balance="zigzag")

Every member calls it with its rows, cut by `shard`; the result, and the gradients, are as if one process had computed
the whole. A member that dies in the middle makes it raise `MemberLost` at all others, inputs untouched: cut the
sequence for those that are left, and call it again.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.subgroup import SubGroup
from collectives.topology import Topology
from parallel.attention.choice import choose
from parallel.attention.kernels import Binder
from parallel.attention.layout import Problem, layout
from parallel.attention.shares import Balance, Run, Share

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PIECE = 2**20
"""Bytes of a piece, at least, unless it is asked for: smaller ones gain less than their messages and kernels cost."""
MOST_PARTS = 16
Members = Communicator | SubGroup
Lengths = tuple[tuple[int, ...], tuple[int, ...]]
"""Rows of the queries and of the keys that each rank has."""


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    comm: Members,
    causal: bool = False,
    scheme: str = "auto",
    balance: str | Balance = "contiguous",
    *,
    scale: float | None = None,
    parts: int | None = None,
    columns: int = 1,
    lengths: Lengths | None = None,
    topology: Topology | None = None,
) -> Tensor:
    """Return this member's rows of the attention of all queries to all keys; differentiable once.

    Args:
        q: (B, Hq, Sq_local, D), fp64, fp32, bf16 or fp16, on CPU, of any strides. Not to be changed before the
            backward pass, as with any function of torch. Under `torch.autocast`, all are cast as torch's own does.
        k, v: (B, Hkv, Skv_local, D), of the same dtype; Hkv divides Hq (grouped queries).
        comm: a communicator or a sub-group; all its members call this alike.
        causal: row i of the whole sequence sees keys up to row i: the diagonal begins at the top left, as that of
            `is_causal` of torch, also where there are more keys than queries (where decoding, give no mask).
        scheme: one of `layout.SCHEMES`, or "auto": the one that the simulator finds fastest. With "tree", for decoding,
            every member gives all queries and gets all of the result, and holds any part of the keys, also none.
        balance: which rows each member has: "contiguous" (pieces of any lengths), "zigzag", "striped", or a `Balance`
            for packed documents.
        scale: of the scores; None: 1/sqrt(D).
        parts: into how many pieces a member's rows are cut: transfers of one overlap with computing on another, and
            memory is needed for a few pieces of others, not for all of them. None: 1 to 16, of 1 MiB or more.
        columns: members of a node ("hybrid"), or that share the heads ("usp").
        lengths: the rows of all members, if known; else they are gathered first.
        topology: the network, for "auto".

    Returns:
        (B, Hq, Sq_local, D), of the dtype of `q`. Rows that see no key are 0.

    Raises:
        UsageError: shapes or dtypes that do not fit, or rows that are not as `balance` says.
        DescriptorMismatch: members call it with different shapes, dtypes or settings.
        MemberLost: a member died before it was complete; at every other member.

    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    _check(q, k, v)
    chosen = balance if isinstance(balance, Balance) else Balance(balance)
    rows = _gathered(q.shape[2], k.shape[2], comm) if lengths is None else _given(lengths, q.shape[2], k.shape[2], comm)
    problem = Problem(
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[3],
        q.dtype,
        _shares(chosen, rows[0], comm, scheme == "tree"),
        _shares(chosen, rows[1], comm, False),
        causal,
        1 / math.sqrt(q.shape[3]) if scale is None else scale,
        "ring" if scheme == "auto" else scheme,
        columns,
        _parts(k, rows[1]) if parts is None else parts,
    )
    if scheme == "auto":
        problem = choose(problem, topology)
    out: Tensor = _Attention.apply(q, k, v, problem, comm)  # type: ignore[no-untyped-call]
    return out


class SequenceAttention(nn.Module):
    """`sequence_attention` with its settings, as a module.

    Args:
        comm: the members. The rest as `sequence_attention`.

    """

    def __init__(
        self,
        comm: Members,
        causal: bool = False,
        scheme: str = "auto",
        balance: str | Balance = "contiguous",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.comm, self.causal, self.scheme, self.balance, self.settings = comm, causal, scheme, balance, settings

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `sequence_attention`."""
        return sequence_attention(q, k, v, self.comm, self.causal, self.scheme, self.balance, **self.settings)

    def extra_repr(self) -> str:
        """The settings."""
        return f"causal={self.causal}, scheme={self.scheme!r}, balance={self.balance!r}"


def attention_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem, comm: Members) -> tuple[Tensor, Tensor]:
    """Run the forward schedule: (out, lse), out (B, Hq, Sq_local, D) and lse (B, Hq, Sq_local) of `partial_dtype`."""
    plan = layout(problem)
    binder = Binder(plan, comm.rank)
    outcome = comm.redistribute(plan.schedule, binder.source((q,), (k, v)), kernels=binder.kernels)
    out, lse = binder.results(_line(outcome.result))
    return out, lse


def attention_backward(
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], problem: Problem, comm: Members
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward schedule on (q, k, v, grad_out, out, lse): gradients of q, k and v, of `partial_dtype`."""
    q, k, v, grad_out, out, lse = given
    plan = layout(problem, backward=True)
    binder = Binder(plan, comm.rank)
    source = binder.source((q, grad_out, out, lse), (k, v))
    outcome = comm.redistribute(plan.schedule, source, kernels=binder.kernels)
    grad_q, grad_k, grad_v = binder.results(_line(outcome.result))
    return grad_q, grad_k, grad_v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, comm: Members) -> Tensor:
        out, lse = attention_forward(q, k, v, problem, comm)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem, ctx.comm = problem, comm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        found = attention_backward((q, k, v, grad_out, out, lse), ctx.problem, ctx.comm)
        return (*(tensor.to(q.dtype) for tensor in found), None, None)


def _line(result: Tensor | None) -> Tensor:
    assert result is not None  # a schedule always gives something, be it empty
    return result


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise UsageError(
            f"attention takes q (B, Hq, Sq, D) and k, v (B, Hkv, Skv, D), not {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise UsageError(
            f"q {list(q.shape)} and k {list(k.shape)} must have the same batch and head size, and the heads of k must "
            f"divide those of q"
        )
    if not (q.shape[1] and q.shape[3]):
        raise UsageError(f"q {list(q.shape)} has no heads, or heads of size 0, of which there are no scores")
    if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise UsageError(f"attention takes tensors of one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if {q.device.type, k.device.type, v.device.type} != {"cpu"}:
        raise UsageError("attention takes tensors on the CPU; move them there with .cpu()")


def _gathered(queries: int, keys: int, comm: Members) -> Lengths:
    """Tell each other how many rows each has."""
    outcome = comm.all_gather(
        torch.tensor([queries, keys], dtype=torch.int64), out=torch.empty(comm.size, 2, dtype=torch.int64)
    )
    found = _line(outcome.result)
    return tuple(found[:, 0].tolist()), tuple(found[:, 1].tolist())


def _given(lengths: Lengths, queries: int, keys: int, comm: Members) -> Lengths:
    """Check lengths that the caller knows. UsageError: not those of these members, or not of this one's tensors."""
    rows = tuple(lengths[0]), tuple(lengths[1])
    if {len(side) for side in rows} != {comm.size}:
        raise UsageError(f"lengths name {len(rows[0])} and {len(rows[1])} ranks, and there are {comm.size}")
    said = rows[0][comm.rank], rows[1][comm.rank]
    if said != (queries, keys):
        raise UsageError(
            f"lengths give rank {comm.rank} {said[0]} queries and {said[1]} keys, and its tensors have {queries} and "
            f"{keys}"
        )
    return rows


def _parts(k: Tensor, rows: tuple[int, ...]) -> int:
    """Into how many pieces to cut rows, so that each has PIECE bytes of keys and values; on all ranks alike."""
    batch, heads, _, dim = k.shape
    held = 2 * batch * heads * dim * k.element_size() * max(rows)
    return min(MOST_PARTS, max(1, held // PIECE))


def _shares(balance: Balance, rows: tuple[int, ...], comm: Members, replicated: bool) -> tuple[Share, ...]:
    """What each rank has. UsageError: not what the balance says; on all ranks alike."""
    if replicated:
        if len(set(rows)) > 1:
            raise UsageError(f"tree: all ranks give the same queries, not {list(rows)} rows")
        return tuple(Share((Run(0, rows[0], 0, 1, 0),), (rows[0],)) for _ in rows)
    if balance.name == "contiguous" and not balance.documents:
        return tuple(Share((Run(0, count, sum(rows[:rank]), 1, 0),), (count,)) for rank, count in enumerate(rows))
    shares = balance.shares(sum(rows), comm.size)
    due = tuple(share.rows for share in shares)
    if due != rows:
        raise UsageError(f"{balance.name}: ranks must have {list(due)} rows, not {list(rows)}; cut them with shard()")
    return shares
