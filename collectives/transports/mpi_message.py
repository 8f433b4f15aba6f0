"""One bulk transfer over MPI: requests that are polled, and what becomes of them when the epoch is given up.

Made by `mpi` for each `send` and `recv`. A request may be tested by one thread at a time; the lock of its message sees
to that, since `abandon` comes from another thread than the one that waits.
"""

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from collectives.errors import TransportLost
from collectives.transports.base import Pending
from collectives.transports.mpi_leftovers import Stream

if TYPE_CHECKING:
    from collectives.transports.mpi import MpiTransport
    from collectives.transports.mpi_world import Place

_EAGER_TURNS = 50
_YIELDING_TURNS = 2000
_NAP = 50e-6
_LONGEST_NAP = 1e-3


class Inbound:
    """The receives from a rank on a channel; those that were posted before its tag was known wait in `unposted`."""

    __slots__ = ("channel", "peer", "place", "stream", "unposted")

    def __init__(self, peer: int, channel: int, place: "Place") -> None:
        self.peer = peer
        self.channel = channel
        self.place = place
        self.stream: Stream | None = None
        self.unposted: list[Message] = []


class Message(Pending):
    """A posted send or receive.

    Attributes:
        peer: rank in the epoch at the other end.
        data: its memory, referenced for as long as MPI may touch it.
        sent_on: the stream of a send, else None.
        inbound: what a receive belongs to, else None.

    """

    __slots__ = ("_abandoned", "_lock", "_requests", "_transport", "data", "inbound", "peer", "sent_on")

    def __init__(
        self,
        transport: "MpiTransport",
        peer: int,
        data: Tensor,
        *,
        sent_on: Stream | None = None,
        inbound: Inbound | None = None,
    ) -> None:
        self.peer = peer
        self.data: Tensor | None = data
        self.sent_on = sent_on
        self.inbound = inbound
        self._transport = transport
        self._requests: list[Any] | None = None
        self._lock = threading.Lock()
        self._abandoned = False

    def posted(self, requests: list[Any]) -> None:
        """Take the MPI requests of its pieces."""
        self._requests = requests

    def wait(self) -> None:
        """See `Pending.wait`. Polls: first eagerly, then yielding the core to whoever wants it, then with naps."""
        transport = self._transport
        if self._requests is None:
            assert self.inbound is not None
            transport.learn_tag(self.inbound)
        turn = 0
        while not self._test():
            transport.refuse()
            turn += 1
            if turn > _YIELDING_TURNS:
                time.sleep(min(_NAP * (turn - _YIELDING_TURNS) / 100, _LONGEST_NAP))
            elif turn > _EAGER_TURNS:
                os.sched_yield()
        transport.settled(self)

    def abandon(self) -> int:
        """Give it up, from any thread, while another may wait for it; return how many receives met no message."""
        world, unmet = self._transport.world, 0
        with self._lock:
            self._abandoned = True
            self._requests = self._requests or []
            if self.inbound is not None:
                status = world.mpi.Status()
                for request in self._requests:
                    try:
                        with world.guard:
                            request.Cancel()
                            unmet += bool(request.Test(status) and status.Is_cancelled())
                    except world.failure:
                        continue  # the other end died; `over` will find the same
        return unmet

    def over(self) -> bool:
        """Whether MPI has let go of the memory, be it by success or by error."""
        try:
            with self._lock:
                return self._poll()
        except self._transport.world.failure:
            self.data = None  # the other end died
            return True

    def nudge(self) -> None:
        """Let MPI work on it, if nobody else does so now; how it ended is for `wait` to find."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._requests:
                with suppress(self._transport.world.failure), self._transport.world.guard:
                    self._requests[-1].Get_status()
        finally:
            self._lock.release()

    def _test(self) -> bool:
        with self._lock:
            if self._abandoned:
                raise TransportLost("the transport of this epoch was aborted")
            try:
                return self._poll()
            except self._transport.world.failure as error:
                raise self._transport.lost(error, self.peer) from None

    def _poll(self) -> bool:
        """Test what is not over; called under the lock."""
        requests = self._requests
        assert requests is not None
        with self._transport.world.guard:
            while requests:
                if not requests[-1].Test():
                    return False
                requests.pop()
        self.data = None
        return True
