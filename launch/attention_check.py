"""What `ringhold attention` holds a scheme to: one process with torch's attention, on some rows of each rank.

Only some queries are looked at, so that one process can afford long sequences. For the backward pass the gradient of
the output is zero but for these queries: nothing comes of the others, and keys and values have the whole of theirs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from parallel.attention.api import attention_backward, attention_forward
from parallel.attention.layout import Problem
from parallel.attention.shares import Balance

SAMPLE = 128
"""Rows of each rank whose result is compared; and of all ranks together, that have a gradient."""
Text = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Queries, keys and values (B, H, rows, D) of any rows of the sequence."""


class Errors(NamedTuple):
    """The largest difference from fp64: of all ranks, and of one process in the same dtype."""

    ours: float
    single: float


class Check:
    """One problem, at a length that one process can afford.

    Args:
        problem: of `rows` rows, cut by `balance`.
        comm: the ranks.
        text: where tensors come from.

    """

    def __init__(self, problem: Problem, rows: int, balance: Balance, comm: Communicator, text: Text) -> None:
        self._problem, self._comm, self._dtype = problem, comm, problem.dtype
        self._rows = [balance.indices(rows, comm.size, rank) for rank in range(comm.size)]
        self._queries = [torch.tensor([rows - 1])] * comm.size if problem.scheme == "tree" else self._rows
        self._whole = text(torch.arange(rows))
        self._q = self._whole[0][:, :, self._queries[comm.rank]]
        self._k, self._v = (tensor[:, :, self._rows[comm.rank]] for tensor in self._whole[1:])

    def run(self, backward: bool) -> list[Errors]:
        """Attend, and the backward pass as well if that is asked for; errors of each, on all ranks alike."""
        out, lse = attention_forward(self._q, self._k, self._v, self._problem, self._comm)
        found = [self._forward(out)]
        if backward:
            found.append(self._backward(out, lse))
        return found

    def _forward(self, out: Tensor) -> Errors:
        some = _sampled(len(self._queries[self._comm.rank]), SAMPLE)
        at = self._queries[self._comm.rank][some]
        exact, single = (self._attend(at, dtype)[0].detach() for dtype in (torch.float64, self._dtype))
        return self._largest([out[:, :, some]], [single], [exact])

    def _backward(self, out: Tensor, lse: Tensor) -> Errors:
        """Gradients of this rank's queries, keys and values."""
        rank, tree = self._comm.rank, self._problem.scheme == "tree"
        owners = [rank] if tree else range(self._comm.size)
        each = max(1, SAMPLE // self._comm.size)
        some = {owner: _sampled(len(self._queries[owner]), each) for owner in owners}
        at = torch.cat([self._queries[owner][some[owner]] for owner in owners])
        first = sum(len(some[owner]) for owner in owners if owner < rank)
        mine = slice(first, first + len(some[rank]))

        chance = torch.Generator().manual_seed(0)
        batch, heads, _, dim = self._q.shape
        grad = torch.randn((batch, heads, len(at), dim), generator=chance).to(self._dtype)
        spread = torch.zeros_like(self._q)
        spread[:, :, some[rank]] = grad[:, :, mine]
        given = (self._q, self._k, self._v, spread, out.to(self._dtype), lse)
        ours = attention_backward(given, self._problem, self._comm)

        def due(dtype: torch.dtype) -> list[Tensor]:
            attended, leaves = self._attend(at, dtype)
            q, k, v = torch.autograd.grad(attended, leaves, grad.to(dtype))
            whole = torch.zeros_like(self._q, dtype=dtype)
            whole[:, :, some[rank]] = q[:, :, mine]
            return [whole, *(tensor[:, :, self._rows[rank]] for tensor in (k, v))]

        return self._largest(list(ours), due(self._dtype), due(torch.float64))

    def _attend(self, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One process, with these rows' queries; the result, and (q, k, v) that it has gradients by."""
        q, k, v = (
            tensor.to(dtype, copy=True).requires_grad_() for tensor in (self._whole[0][:, :, at], *self._whole[1:])
        )
        mask = (torch.arange(self._whole[1].shape[2]) <= at[:, None]) if self._problem.causal else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True), (q, k, v)

    def _largest(self, ours: list[Tensor], single: list[Tensor], exact: list[Tensor]) -> Errors:
        errors = [
            max(
                float((a.to(self._dtype).double() - b).abs().max()) if a.numel() else 0.0
                for a, b in zip(found, exact, strict=True)
            )
            for found in (ours, single)
        ]
        largest = self._comm.all_reduce(torch.tensor(errors, dtype=torch.float64), "max").result
        assert largest is not None
        return Errors(float(largest[0]), float(largest[1]))


def _sampled(rows: int, most: int) -> Tensor:
    """Up to so many rows, from the first to the last."""
    return torch.linspace(0, max(0, rows - 1), min(most, rows)).long()
