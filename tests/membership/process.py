"""Who gets the events of a simulated run: nobody who is dead, later if it is stopped. `world.World` keeps to it."""

from collections.abc import Callable
from typing import Any


class Killed(Exception):
    """The process ended at this point."""


class Process:
    """A process, or what cannot die."""

    def __init__(self) -> None:
        self.dead = self.stopped = False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        """What came while it was stopped."""

    def get(self, action: Callable[..., None], given: tuple[Any, ...]) -> None:
        """Get an event."""
        if self.stopped:
            self.backlog.append((action, given))
        elif not self.dead:
            try:
                action(*given)
            except Killed:
                return

    def wake(self, first: Callable[..., None] | None) -> None:
        """Get time again; what waited comes in order, `first`, if given, before all else."""
        self.stopped = False
        backlog, self.backlog = self.backlog, []
        if first is not None:
            backlog.sort(key=lambda entry: entry[0] != first)
        for action, given in backlog:
            self.get(action, given)
