"""Checkpoints: layouts at rest. Public names load on first use: some need torch, most work on checkpoints does not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoint.background import SaveHandle, save_async
    from checkpoint.holdings import Sharded
    from checkpoint.loading import LoadOptions, LoadReport, load, load_state
    from checkpoint.peers import Offer
    from checkpoint.saving import SaveOptions, SaveReport, save

__all__ = [
    "LoadOptions",
    "LoadReport",
    "Offer",
    "SaveHandle",
    "SaveOptions",
    "SaveReport",
    "Sharded",
    "load",
    "load_state",
    "save",
    "save_async",
]

_HOMES = {
    "LoadOptions": "loading",
    "LoadReport": "loading",
    "Offer": "peers",
    "SaveHandle": "background",
    "SaveOptions": "saving",
    "SaveReport": "saving",
    "Sharded": "holdings",
    "load": "loading",
    "load_state": "loading",
    "save": "saving",
    "save_async": "background",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
