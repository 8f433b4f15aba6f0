"""How compound operations are taken apart while a step is traced, so that few operations remain in the graph.

Used by `parallel.capture`. What is one kernel with a simple rule stays whole (layer norm, attention, gelu and its
gradient); what hides a reduction that a planner must see is taken apart: losses, so that a vocabulary may be split,
means, batch norms, and sums with a bias.
"""

from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _mean_dim(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """A sum and a division by the number of all elements, which no shard has to know."""
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count = 1
    for d in dims:
        count *= x.shape[d]
    return aten.div.Scalar(aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype), count)


def _mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _mean_dim(x, None, dtype=dtype)


def _sum(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return aten.sum.dim_IntList(x, list(range(x.dim())), False, dtype=dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """A product whose partial sums can be added up before the bias comes in."""
    product = aten.mm.default(a, b)
    if alpha != 1:
        product = aten.mul.Scalar(product, alpha)
    return aten.add.Tensor(product, bias if beta == 1 else aten.mul.Scalar(bias, beta))


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = aten.bmm.default(a, b)
    if alpha != 1:
        product = aten.mul.Scalar(product, alpha)
    return product if beta == 0 else aten.add.Tensor(product, bias if beta == 1 else aten.mul.Scalar(bias, beta))


def _square(x: Tensor, exponent: float) -> Any:
    """Write squares as products: one rule less."""
    return aten.mul.Tensor(x, x) if exponent == 2 else NotImplemented


TABLE: dict[Any, Any] = {
    **get_decompositions(
        [
            aten.nll_loss_forward,
            aten.nll_loss_backward,
            aten._log_softmax,
            aten._log_softmax_backward_data,
            aten.mse_loss,
            aten.mse_loss_backward,
            aten.l1_loss,
            aten.binary_cross_entropy_with_logits,
            aten._native_batch_norm_legit_functional,
            aten.native_batch_norm_backward,
            aten.var_mean,
            aten.var,
            aten.std,
        ]
    ),
    aten.mean.dim: _mean_dim,
    aten.mean.default: _mean,
    aten.sum.default: _sum,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.pow.Tensor_Scalar: _square,
}
