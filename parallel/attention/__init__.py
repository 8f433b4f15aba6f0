"""Exact attention over sequences that are spread over ranks, differentiable, on CPU. Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.attention.api import SequenceAttention, sequence_attention
    from parallel.attention.model import sequence_parallel
    from parallel.attention.shares import Balance, shard, unshard

_HOMES = {
    "Balance": "shares",
    "SequenceAttention": "api",
    "sequence_attention": "api",
    "sequence_parallel": "model",
    "shard": "shares",
    "unshard": "shares",
}
__all__ = ["Balance", "SequenceAttention", "sequence_attention", "sequence_parallel", "shard", "unshard"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
