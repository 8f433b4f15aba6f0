"""What an aborted epoch leaves in the MPI library, and how it gets out of there. Used by `mpi`.

MPI cannot take back a send, so its memory belongs to the library until the other end has received it, and a survivor
that gave the epoch up has not. Therefore, when two survivors meet in the next epoch, each tells the other of its sends
that are not over (`Owed`), and the other receives into a bin what it had not received. A receive that met no message is
cancelled; one that did is let to end. Until MPI says that a transfer is over, its memory stays referenced here.

Messages with one tag from one rank arrive in order, so counting them is enough to know which are still to come.
"""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collectives.transports.mpi_world import Place, World

Owed = tuple[str, int, int, int, int]
"""Of a stream of sends: the receiver's universe and rank in it, the tag, how many messages were sent, bytes of the
longest."""


class Stream:
    """Messages with one tag from one process to another, which is at `place`."""

    __slots__ = ("count", "largest", "place", "tag")

    def __init__(self, place: "Place", tag: int) -> None:
        self.place = place
        self.tag = tag
        self.count = 0
        self.largest = 0

    def add(self, size: int) -> None:
        """Count one more message of so many bytes."""
        self.count += 1
        self.largest = max(self.largest, size)


class Transfer(Protocol):
    """A transfer of an aborted epoch."""

    @property
    def sent_on(self) -> Stream | None:
        """The stream of a send, None for a receive."""

    def over(self) -> bool:
        """Whether MPI has let go of the memory, be it by success or by error."""


class _Binned:
    """A receive into the bin."""

    sent_on = None

    def __init__(self, world: "World", place: tuple[str, int], tag: int, into: bytearray) -> None:
        self._world = world
        self._into = into
        universe, rank = place
        with world.guard:
            self._request: Any = world.universes[universe].comm.Irecv([into, world.mpi.BYTE], rank, tag)

    def over(self) -> bool:
        try:
            with self._world.guard:
                return bool(self._request.Test())
        except self._world.failure:
            return True  # the sender died


class Leftovers:
    """Transfers of former epochs of this process. For any thread."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._lock = threading.Lock()
        self._transfers: list[Transfer] = []
        self._received: dict[tuple[str, int, int], int] = {}
        """Messages of each stream, which is known by its sender's universe and rank and its tag."""

    def keep(self, transfer: Transfer) -> None:
        """Keep a transfer, and so its memory, until it is over."""
        with self._lock:
            self._transfers.append(transfer)

    def remember(self, stream: Stream) -> None:
        """Take note of how many messages of a stream were received, or will be by a transfer that is kept."""
        with self._lock:
            self._received[*stream.place, stream.tag] = stream.count

    def sweep(self) -> int:
        """Let go of what is over; return how many transfers are left."""
        if self._transfers:
            with self._lock:
                self._transfers = [transfer for transfer in self._transfers if not transfer.over()]
        return len(self._transfers)

    def owed(self) -> list[Owed]:
        """Return the streams of which sends are not over."""
        self.sweep()
        with self._lock:
            streams = {id(t.sent_on): t.sent_on for t in self._transfers if t.sent_on is not None}
        return [(*stream.place, stream.tag, stream.count, stream.largest) for stream in streams.values()]

    def discard(self, places: Mapping[str, int], owed: list[Owed]) -> None:
        """Receive, and forget, what a process still sends us from former epochs; `places` are its ranks by universe.

        Raises:
            The library's error: the process is dead.

        """
        here = {name: universe.rank for name, universe in self._world.universes.items()}
        with self._lock:
            still: dict[tuple[str, int, int], int] = {}
            for universe, receiver, tag, count, largest in owed:
                if here.get(universe) != receiver:
                    continue
                place, into = (universe, places[universe]), bytearray(largest)
                for _ in range(count - self._received.get((*place, tag), 0)):
                    self._transfers.append(_Binned(self._world, place, tag, into))
                still[*place, tag] = count
            # Streams that it does not name any more are over for good.
            sender = set(places.items())
            self._received = {key: count for key, count in self._received.items() if key[:2] not in sender} | still
