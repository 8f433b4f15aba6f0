"""Send and receive: an operation of a sub-group of two, whose schedule is one transfer.

So a message is an operation like any other: headers are compared before data move, both ends have the result or none,
and a change of the membership resumes it. A lane per (source, destination, tag) keeps messages in the order of the
calls and different tags apart.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, overload

from torch import Tensor

from collectives.errors import MemberLost, UsageError
from collectives.lanes import Lane, Lanes
from collectives.membership.claims import lane_of
from collectives.operations import Broadcast, Operation, View
from collectives.outcome import Outcome, Work


@dataclass(slots=True, kw_only=True)
class Message(Broadcast):
    """One message: a broadcast between two, along a chain of one transfer. Neither can go on without the other (R6).

    `lost` tells the ids of the members that are gone.
    """

    kind: ClassVar[str] = "send_recv"
    shrinks: ClassVar[bool] = False
    algorithm: str = "ring"
    lost: Callable[[], Collection[int]]

    def run(self, execute: Callable[[Operation], Outcome]) -> Outcome:
        """Execute it. What a sender alone has staged is no message: its receiver may have had none of it."""
        outcome = execute(self)
        here, there = self.view.members[self.view.rank], self.view.members[1 - self.view.rank]
        if outcome.from_staging and here == self.root and there in self.lost():
            text = (
                f"{self.kind} {self.seq} of lane {self.lane!r}: member {there} was lost before it was known to have it"
            )
            raise MemberLost(text, (there,), (here,))
        return outcome


class PointToPoint(ABC):
    """`send` and `recv`; the communicator inherits them."""

    _lanes: Lanes

    @property
    @abstractmethod
    def member_id(self) -> int:
        """Number of this member."""

    @abstractmethod
    def _pair_lane(self, name: str, pair: tuple[int, int]) -> Lane:
        """Return the lane of a pair. Raises `UsageError` where one of them never was a member."""

    @abstractmethod
    def _lost_members(self) -> Collection[int]:
        """Return the ids of the members that went since this one came."""

    @overload
    def send(
        self, tensor: Tensor, to: int, tag: int = ..., *, snapshot: bool = ..., async_op: Literal[False] = ...
    ) -> Outcome: ...
    @overload
    def send(
        self, tensor: Tensor, to: int, tag: int = ..., *, snapshot: bool = ..., async_op: Literal[True]
    ) -> Work: ...
    def send(
        self, tensor: Tensor, to: int, tag: int = 0, *, snapshot: bool = False, async_op: bool = False
    ) -> Outcome | Work:
        """Send a tensor to member `to` (an id, not a rank), which calls `recv` with the same tag, shape and dtype.

        Args:
            tensor: any dense CPU tensor; must be left alone until the outcome, unless `snapshot` copies it.
            to: the receiver.
            tag: messages of one tag arrive in the order of the calls. Tags are lanes: use a few, again and again.
            snapshot: copy the tensor now.
            async_op: return at once.

        Raises:
            MemberLost: the receiver was lost; it has nothing of it.
            DescriptorMismatch: the receiver expects another shape or dtype; at both ends.
            UsageError: `to` is no member, or this one.

        """
        return self._message(tensor, self.member_id, to, tag, snapshot, async_op)

    @overload
    def recv(self, tensor: Tensor, source: int, tag: int = ..., *, async_op: Literal[False] = ...) -> Outcome: ...
    @overload
    def recv(self, tensor: Tensor, source: int, tag: int = ..., *, async_op: Literal[True]) -> Work: ...
    def recv(self, tensor: Tensor, source: int, tag: int = 0, *, async_op: bool = False) -> Outcome | Work:
        """Receive what member `source` (an id, not a rank) sends with this tag, into `tensor`.

        The tensor is written once the message is here whole and the sender knows that; with an error it is untouched.
        Arguments and errors are as of `send`. As in every operation, a partner that does not come to it within the
        option `op_timeout`, and waits for nobody itself, is evicted (rule R11).
        """
        return self._message(tensor, source, self.member_id, tag, False, async_op)

    def _message(
        self, tensor: Tensor, source: int, destination: int, tag: int, snapshot: bool, async_op: bool
    ) -> Outcome | Work:
        if source == destination:
            raise UsageError(f"member {source} cannot send to itself")
        if not 0 <= tag < 2**31:
            raise UsageError(f"tag {tag}: tags are numbers from 0 to 2**31 - 1")
        pair = (source, destination)
        lane = self._pair_lane(lane_of(f"{source}>{destination}", pair, f"tag {tag}"), pair)
        # It is about both of them, also where one was lost before the call: whoever waits for it is told so.
        view = View(lane.view.epoch, pair, pair.index(self.member_id))
        operation = Message(
            tensor=tensor, root=source, lane=lane.name, view=view, snapshot=snapshot, lost=self._lost_members
        )
        return self._lanes.start(lane, operation, async_op)
