"""Sub-groups of a run's members, as in hybrid parallel training: collectives that fail apart from each other.

`Communicator.group` makes them. An operation of a sub-group runs, is confirmed and is recovered among its living
members only; the death of an outsider changes the epoch under it and nothing else.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from collectives.calls import Collectives
from collectives.errors import UsageError
from collectives.lanes import LONGEST_NAME, Lane, Lanes, check_name
from collectives.membership.claims import digest_of, lane_of
from collectives.membership.member import MAIN
from collectives.operations import Call, View
from collectives.outcome import Outcome, Work


class SubGroup(Collectives):
    """The collectives of `Collectives` among some members of a communicator. A context manager that closes it.

    Its lanes are its own: "main" of a sub-group and "main" of the communicator are two. Ranks are places in `members`.
    """

    def __init__(self, name: str, members: tuple[int, ...], lanes: Lanes) -> None:
        self.name = name
        self._listed = members
        self._lanes = lanes
        self._used: dict[str, Lane] = {}
        self._closed = False
        self._lane(MAIN)

    @property
    def rank(self) -> int:
        """This member's place among `members`."""
        return self._view(MAIN).rank

    @property
    def member_id(self) -> int:
        """Number of this member."""
        return self.members[self.rank]

    @property
    def size(self) -> int:
        """How many members the sub-group has."""
        return self._view(MAIN).size

    @property
    def members(self) -> tuple[int, ...]:
        """Ids of its members by rank, without those that were lost. Changes only when a call returns (rule R5)."""
        return self._view(MAIN).members

    def resume(self, lane: str = MAIN) -> None:
        """Go on after a `MemberLost` of an operation with `on_loss="raise"`: the lane takes operations again."""
        self._lane(lane).resume()

    def close(self) -> None:
        """Wait for what is queued and take no more operations; a second call does nothing. Others need not notice."""
        self._closed = True
        for lane in self._used.values():
            lane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ---

    def _start(self, call: Call, async_op: bool) -> Outcome | Work:
        if self._closed:
            raise UsageError(f"sub-group {self.name!r} was closed; ask the communicator for it again")
        return self._lanes.start(self._lane(call.lane), call, async_op)

    def _view(self, lane: str) -> View:
        return self._lane(lane).view

    def _lane(self, name: str) -> Lane:
        lane = self._used.get(name)
        if lane is None:
            check_name("lane", name)
            lane = self._lanes.lane(lane_of(self.name, self._listed, name), self._listed)
            self._used[name] = lane
        return lane


def check_members(members: Sequence[int], me: int, here: Sequence[int]) -> tuple[int, ...]:
    """Return the members of a sub-group as given. Raises `UsageError` unless all are members, this one among them."""
    chosen = tuple(members)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"sub-group {list(chosen)}: a member is in it twice")
    if strangers := [member for member in chosen if member not in here]:
        raise UsageError(f"sub-group {list(chosen)}: {strangers} are no members; the members are {list(here)} (ids)")
    if me not in chosen:
        raise UsageError(f"sub-group {list(chosen)}: this member, {me}, is not in it; only its members ask for it")
    return chosen


def name_of(members: tuple[int, ...]) -> str:
    """Name of a sub-group that was given none."""
    text = ",".join(map(str, members))
    return text if len(text) <= LONGEST_NAME else f"{len(members)} members {digest_of(members):016x}"
