"""How compound operations are taken apart while a step is traced, so that few operations remain in the graph.

Used by `parallel.capture`. What is one kernel with a simple rule stays whole (layer norm, attention, gelu and its
gradient); what hides a reduction that a planner must see is taken apart: losses, so that a vocabulary may be split,
means, batch norms, and sums with a bias.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _mean_dim(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """A sum and a division by the number of all elements, which no shard has to know."""
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count = math.prod(x.shape[d] for d in dims)
    return aten.div.Scalar(aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype), count)


def _mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _mean_dim(x, None, dtype=dtype)


def _sum(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return aten.sum.dim_IntList(x, list(range(x.dim())), False, dtype=dtype)


def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Any:
    """The variance from the mean of the same elements: two sums, which a planner may see."""
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count = math.prod(x.shape[d] for d in dims)
    mean = _mean_dim(x, dims, True)
    apart = aten.sub.Tensor(x, mean)
    total = aten.sum.dim_IntList(aten.mul.Tensor(apart, apart), dims, keepdim)
    variance = aten.div.Scalar(total, count - (1 if correction is None else correction))
    return variance, mean if keepdim else aten.squeeze.dims(mean, dims)


def _var(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _std(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return aten.sqrt.default(_var(x, dim, correction=correction, keepdim=keepdim))


def _vector_norm(
    x: Tensor,
    order: float = 2,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Lengths of orders 1 and 2; other norms stay whole."""
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    if order == 1:
        return aten.sum.dim_IntList(aten.abs.default(x), dims, keepdim, dtype=dtype)
    if order != 2:
        return NotImplemented
    return aten.sqrt.default(aten.sum.dim_IntList(aten.mul.Tensor(x, x), dims, keepdim, dtype=dtype))


def _max(x: Tensor) -> Any:
    return aten.amax.default(x, list(range(x.dim())))


def _min(x: Tensor) -> Any:
    return aten.amin.default(x, list(range(x.dim())))


def _instance_norm(x: Tensor, gain: Tensor | None, bias: Tensor | None, train: bool, share: float, eps: float) -> Any:
    """A batch norm that keeps no averages."""
    zeros = x.new_zeros((x.shape[1],))
    return _batch_norm(x, gain, bias, zeros, zeros, train, share, eps)[:3]


def _batch_norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    train: bool,
    share: float,
    eps: float,
) -> Any:
    """A norm over all of a channel, which shards of the batch have to add up together; and the running averages."""
    dims = [0, *range(2, x.dim())]
    along = [-1 if d == 1 else 1 for d in range(x.dim())]
    used_mean, used_variance = mean, variance
    empty = x.new_zeros((0,))
    saved, new_mean, new_variance = (empty, empty), mean, variance
    if train:
        used_variance, used_mean = _var_mean(x, dims, correction=0)
        count = x.numel() // x.shape[1]
        unbiased = aten.mul.Scalar(used_variance, count / max(count - 1, 1))
        new_mean, new_variance = aten.lerp.Scalar(mean, used_mean, share), aten.lerp.Scalar(variance, unbiased, share)
    scale = aten.rsqrt.default(aten.add.Scalar(used_variance, eps))
    if train:
        saved = (used_mean, scale)
    out = aten.mul.Tensor(aten.sub.Tensor(x, used_mean.view(along)), scale.view(along))
    out = out if gain is None else aten.mul.Tensor(out, gain.view(along))
    out = out if bias is None else aten.add.Tensor(out, bias.view(along))
    return out, *saved, new_mean, new_variance


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


def _batch_norm_evaluated(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, share: float, eps: float
) -> Any:
    return _batch_norm(x, gain, bias, mean, variance, False, share, eps)[:3]


TABLE: dict[Any, Any] = {
    **get_decompositions(
        [
            aten.nll_loss_forward,
            aten.nll_loss_backward,
            aten.nll_loss2d_forward,
            aten.nll_loss2d_backward,
            aten.binary_cross_entropy,
            aten.binary_cross_entropy_backward,
            aten.huber_loss,
            aten.huber_loss_backward,
            aten.soft_margin_loss,
            aten.soft_margin_loss_backward,
            aten.glu,
            aten.glu_backward,
            aten.mish_backward,
            aten._prelu_kernel,
            aten._prelu_kernel_backward,
            aten.pixel_shuffle,
            aten.pixel_unshuffle,
            aten.std_mean,
            aten.addmv,
            aten.fill,
            aten.norm,
            aten._log_softmax,
            aten._log_softmax_backward_data,
            aten.mse_loss,
            aten.mse_loss_backward,
            aten.l1_loss,
            aten.binary_cross_entropy_with_logits,
            aten.smooth_l1_loss,
            aten.smooth_l1_loss_backward,
            aten.log_sigmoid_forward,
            aten.log_sigmoid_backward,
            aten.logsumexp,
            aten.native_group_norm,
            aten.native_group_norm_backward,
            aten.native_batch_norm_backward,
        ]
    ),
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.var_mean.correction: _var_mean,
    aten.var.correction: _var,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_evaluated,
    aten._native_batch_norm_legit.no_stats: _instance_norm,
    aten.std.correction: _std,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.max.default: _max,
    aten.min.default: _min,
    aten.mean.dim: _mean_dim,
    aten.mean.default: _mean,
    aten.sum.default: _sum,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.pow.Tensor_Scalar: _square,
}
