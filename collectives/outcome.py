"""What an operation returns: its result, and who took part in it."""

import threading
from dataclasses import dataclass

from torch import Tensor

from collectives.errors import OperationTimeout


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operation ended.

    Attributes:
        result: the tensor that holds the result (the caller's own where the operation was in place), None for barrier.
        contributors: ids of the members whose data are in it, by rank; `avg` divided by their number.
        epoch: the epoch whose attempt completed it.
        attempts: how often it was run here, 1 where nobody was lost.
        from_staging: whether a membership change completed it, from what all survivors had staged.
        results: of operations with several results, these.
        counts: of operations on rows of uneven number, how many rows are each contributor's.

    """

    result: Tensor | None
    contributors: tuple[int, ...]
    epoch: int
    attempts: int
    from_staging: bool
    results: tuple[Tensor, ...] = ()
    counts: tuple[int, ...] = ()


class Work:
    """An operation under way; `Communicator` operations with `async_op=True` return it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

    def is_completed(self) -> bool:
        """Tell whether `wait` would return (or raise) at once."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Return the outcome; wait up to `timeout` seconds (None: until it ends).

        A timeout cancels nothing (rule R4): the operation goes on and `wait` may be called again.

        Raises:
            OperationTimeout: not done in time.
            RingholdError: the operation failed, with its error.

        """
        if not self._done.wait(timeout):
            raise OperationTimeout(f"the operation is not done after {timeout} s; it goes on, wait again")
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def settle(self, outcome: Outcome | None, error: BaseException | None) -> None:
        """For the lane that runs it: it ended, one way or the other."""
        self._outcome, self._error = outcome, error
        self._done.set()
