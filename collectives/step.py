"""One training step as a unit: all of its collectives over the same members, or none of it counts (rule R15)."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from collectives.errors import MemberLost
from collectives.membership.member import among
from collectives.outcome import Outcome

if TYPE_CHECKING:
    from collectives.communicator import Communicator


class Step:
    """A context that ends with an agreement whether the step counts; `Communicator.step` makes it.

        with comm.step() as step:
            ...  # compute and reduce; nothing that cannot be undone
        if step.committed:
            optimizer.step()
        # else restore what was changed and repeat the step: a member was lost in it

    Without it, buckets of one gradient could be summed over different members. A `MemberLost` inside counts as a loss,
    caught or not, and is not raised further; at the end the lanes that it halted take operations again.
    """

    def __init__(self, comm: "Communicator") -> None:
        self._comm = comm
        self._members = comm.members
        self._lost = False
        self.committed = False
        """After the context: the same on every member."""

    def saw(self, end: Outcome | MemberLost, group: tuple[int, ...]) -> None:
        """Take note of how an operation inside the step ended, of that sub-group (empty: all); for the communicator."""
        if isinstance(end, MemberLost) or end.contributors != among(group, self._members):
            self._lost = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None and not isinstance(error, MemberLost):
            return False
        lost = self._lost or error is not None
        if lost:
            self._comm.resume_all()
        flag = torch.tensor([lost], dtype=torch.int32)
        # Lost in this very operation means after all others were complete: the step counts.
        self._comm.all_reduce(flag, "max")
        self.committed = not flag.item()
        return True
