"""Partial results of attention put together: (out, lse) of the same queries over different keys; called by `local`.

`lse` is the logarithm of the sum of the exponentials of a row's scores; a row that attends to nothing has out 0 and lse
-inf. Everything is in fp32, or fp64 for fp64: an lse in bf16 would err by tenths (online softmax: Milakov and
Gimelshein, 2018, arXiv:1805.02867).
"""

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Fold one partial result into another, in place.

    Args:
        out: (..., rows, D). lse: (..., rows).
        other: (..., rows, D), of the same dtype, over other keys. other_lse: (..., rows).

    """
    share = torch.sigmoid(other_lse - lse)
    share = torch.where(torch.isneginf(other_lse), torch.zeros_like(share), share)  # also where both are: NaN
    out.lerp_(other, share.unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)
