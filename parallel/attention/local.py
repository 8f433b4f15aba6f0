"""Attention of one rank's queries to some keys, forward and backward, tile by tile; called by `kernels`.

The work is done by torch's flash attention for CPU, which knows fully visible and causal tiles. fp16 and bf16 are
computed in fp32, so that partial results lose nothing before they are merged.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from parallel.attention.merge import merge
from parallel.attention.shares import Tile

ROWS = 2048
"""Queries that are computed with at once: 4 MiB of eight heads of 64 in fp32. With 1024 it takes 3% longer."""
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which partial results and gradients are kept: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float, out: Tensor, lse: Tensor, first: bool
) -> None:
    """Fold what the tiles give into (out, lse); `first`: set them.

    Args:
        q: (B, Hq, R, D). k, v: (B, Hkv, C, D) with Hkv a divisor of Hq; fp64, fp32, bf16 or fp16.
        tiles: of rows of q and of k.
        scale: of the scores.
        out: (B, Hq, R, D) and lse: (B, Hq, R), of `partial_dtype`.

    """
    q, k, v = (tensor.to(out.dtype) for tensor in (q, k, v))
    if first and not _covers(tiles, q.shape[2]):
        out.zero_()
        lse.fill_(-torch.inf)
        first = False
    done = 0  # rows that have something
    for q0, q1, k0, k1, causal in _cut(tiles):
        found, found_lse = _flash(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], 0.0, causal, scale=scale)
        if first and q0 >= done:
            out[:, :, q0:q1] = found
            lse[:, :, q0:q1] = found_lse
            done = q1
        else:
            merge(out[:, :, q0:q1], lse[:, :, q0:q1], found, found_lse)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> None:
    """Add what the tiles contribute to the gradients that are asked for.

    Args:
        q, k, v, tiles, scale: as `attend`.
        grad_out, out: (B, Hq, R, D), of the whole attention. lse: (B, Hq, R), of the whole attention.
        grad_q: (B, Hq, R, D). grad_k, grad_v: (B, Hkv, C, D). Of `partial_dtype`.

    """
    dtype = lse.dtype
    q, k, v, grad_out, out = (tensor.to(dtype) for tensor in (q, k, v, grad_out, out))
    for q0, q1, k0, k1, causal in _cut(tiles):
        queries, keys = slice(q0, q1), slice(k0, k1)
        found = _flash_backward(
            grad_out[:, :, queries],
            q[:, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, queries],
            lse[:, :, queries],
            0.0,
            causal,
            scale=scale,
        )
        for target, rows, gradient in zip((grad_q, grad_k, grad_v), (queries, keys, keys), found, strict=True):
            if target is not None:
                target[:, :, rows] += gradient


def _cut(tiles: Iterable[Tile]) -> Iterator[Tile]:
    """The same as tiles of few queries: what flash attention makes of one is a copy, to be merged into what is there.

    Of a causal tile, the keys that all rows of such a part see come first, and its own part of the diagonal behind.
    """
    for q0, q1, k0, k1, causal in tiles:
        for start in range(q0, q1, ROWS):
            stop = min(start + ROWS, q1)
            seen = min(start - q0, k1 - k0) if causal else k1 - k0
            if seen:
                yield Tile(start, stop, k0, k0 + seen, False)
            if causal and k0 + seen < k1:
                yield Tile(start, stop, k0 + seen, min(k1, k0 + seen + stop - start), True)


def _covers(tiles: Sequence[Tile], rows: int) -> bool:
    """Whether every row of queries is in some tile, and the first ones of each row come in order."""
    done = 0
    for tile in tiles:
        if tile.q0 == done:
            done = tile.q1
        elif tile.q1 > done:
            return False
    return done == rows
