"""What the methods of all kinds share."""

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias, TypedDict

from collectives.membership.member import MAIN
from collectives.operations import Call, View
from collectives.outcome import Outcome, Work

Blocking: TypeAlias = Literal[False]
Queued: TypeAlias = Literal[True]


class How(TypedDict, total=False):
    """Keywords that every operation takes; see the package."""

    lane: str
    on_loss: str
    algorithm: str
    snapshot: bool


class Caller(ABC):
    """Whoever has a place in a group."""

    @abstractmethod
    def _start(self, call: Call, async_op: bool) -> Outcome | Work:
        """Run the call and return its outcome, or queue it and return its work."""

    @abstractmethod
    def _view(self, lane: str) -> View:
        """Return the ranks that the caller of a lane sees."""

    def _issue(self, call: Call, async_op: bool) -> Outcome | Work:
        """Start the call, if it can be done."""
        call.preflight()
        return self._start(call, async_op)

    def _common(self, how: How, known: frozenset[str] = How.__optional_keys__) -> dict[str, Any]:
        """Fill in the defaults and what the caller sees now. Raises `TypeError` on an unknown keyword."""
        if unknown := sorted(how.keys() - known):
            raise TypeError(f"unknown keyword {unknown[0]!r}; there are {', '.join(sorted(known))}")
        lane = how.get("lane", MAIN)
        return {
            **how,
            "lane": lane,
            "on_loss": how.get("on_loss", "retry"),
            "algorithm": how.get("algorithm", "auto"),
            "snapshot": how.get("snapshot", False),
            "view": self._view(lane),
        }
