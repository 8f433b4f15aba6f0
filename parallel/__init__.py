"""Layouts and reshard, planning, sequence and expert parallelism. Public names load on first use: some need torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.attention import SequenceAttention, sequence_attention, sequence_parallel
    from parallel.capturing import capture
    from parallel.executing import execute
    from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Shard, Split
    from parallel.planner import plan
    from parallel.resharding import reshard

__all__ = [
    "Broadcast",
    "Flat",
    "Layout",
    "Mesh",
    "Partial",
    "SequenceAttention",
    "Shard",
    "Split",
    "capture",
    "execute",
    "plan",
    "reshard",
    "sequence_attention",
    "sequence_parallel",
]

_HOMES = {
    **dict.fromkeys(__all__, "layout"),
    **dict.fromkeys(("SequenceAttention", "sequence_attention", "sequence_parallel"), "attention"),
    "capture": "capturing",
    "execute": "executing",
    "plan": "planner",
    "reshard": "resharding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
