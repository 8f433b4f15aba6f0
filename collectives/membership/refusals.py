"""Refused connections in the coordinator's log: each of a few, a number of many, so that a crowd does not fill a disk.

Used by `server`.
"""

import logging
import time
from collections.abc import Callable

log = logging.getLogger("ringhold.coordinator")

_WINDOW = 10.0
_REASONS, _EACH = 20, 5
"""That are told in so many seconds, and how often each."""


class Refusals:
    """Tells of refused connections; for one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._told: dict[str, int] = {}
        self._untold = 0

    def tell(self, peer: object, why: str) -> None:
        """Log that `peer` was refused, unless too many were lately."""
        now = self._clock()
        if now - self._since >= _WINDOW:
            self.close()
            self._since = now
        often = self._told.get(why, 0)
        if often >= _EACH or (not often and len(self._told) >= _REASONS):
            self._untold += 1
            return
        self._told[why] = often + 1
        log.warning("refused a connection from %s: %s", peer, why)

    def close(self) -> None:
        """Log how many were not told of."""
        if self._untold:
            log.warning("refused %d more connections for the same reasons or others", self._untold)
        self._told.clear()
        self._untold = 0
