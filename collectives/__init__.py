"""Schedules, the engine that runs them, transports, membership and the communicator.

The public face: `Communicator` and what its methods return. Loaded on first use: the coordinator's process needs
nothing of it, and torch, which it imports, takes two seconds and 200 MiB.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collectives.communicator import Communicator
    from collectives.error_feedback import ErrorFeedback
    from collectives.options import Options
    from collectives.outcome import Outcome, Work
    from collectives.step import Step
    from collectives.subgroup import SubGroup
    from collectives.sync import SyncReport

__all__ = ["Communicator", "ErrorFeedback", "Options", "Outcome", "Step", "SubGroup", "SyncReport", "Work"]

_HOMES = {
    "Communicator": "communicator",
    "ErrorFeedback": "error_feedback",
    "Options": "options",
    "Outcome": "outcome",
    "Step": "step",
    "SubGroup": "subgroup",
    "SyncReport": "sync",
    "Work": "outcome",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
