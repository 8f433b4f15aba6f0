"""Builds the transport of each epoch and takes down that of the last, apart from the threads that use them.

The session calls `fence` and `advance`, which do not block; operations ask for `transport(epoch)`. A transport that
cannot be built because a link fails is reported, and the membership decides (rule R11); nothing here does.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from collectives.arena import process_arena
from collectives.errors import OptionError, TransportLost, Unsupported
from collectives.membership.protocol import Decision
from collectives.options import Options
from collectives.transports.base import Transport
from collectives.transports.checked import PREFIX as CHECKED
from collectives.transports.checked import CheckedTransport
from collectives.transports.emulated import PREFIX, EmulatedTransport, emulate, network
from collectives.transports.gloo import GlooTransport
from collectives.transports.handshake import link_key
from collectives.transports.mesh import LinkListener
from collectives.transports.mpi import MpiTransport
from collectives.transports.shm import ShmTransport
from collectives.transports.site import Site
from collectives.transports.sockets import SocketTransport

log = logging.getLogger("ringhold.member")

Built = GlooTransport | SocketTransport | ShmTransport | MpiTransport | CheckedTransport | EmulatedTransport

TRANSPORTS: dict[str, type[GlooTransport | SocketTransport | ShmTransport | MpiTransport]] = {
    "gloo": GlooTransport,
    "sockets": SocketTransport,
    "shm": ShmTransport,
    "mpi": MpiTransport,
}
"""Names that `Communicator.join(transport=...)` knows; each may have "emulated:" before it, and gloo ":4" behind.
Those of CHECKABLE may have "checked:" before them."""
CHECKABLE = ("gloo", "sockets")
MOST_STRIPES = 64


class Epochs:
    """The transports of one member, one epoch after the other.

    `kind` is what they are, or wrap; `arena` is registered memory, where the transport has use for it.

    Args:
        kind: name of the transport.
        run, token: what the links are authenticated with.
        options: where to listen, how long connecting may take.
        on_ready: called with the epoch when its transport is there.
        on_failure: called with (epoch, member id at the other end or 0) when it could not be built.
        on_refusal: called when `transport` has begun to raise.

    """

    def __init__(
        self,
        kind: str,
        run: str,
        token: bytes,
        options: Options,
        *,
        on_ready: Callable[[int], None],
        on_failure: Callable[[int, int], None],
        on_refusal: Callable[[], None],
    ) -> None:
        self.kind, self._stripes, emulated, self._checked = parse_transport(kind)
        TRANSPORTS[self.kind].prepare()
        self.arena = (
            process_arena() if TRANSPORTS[self.kind].lends else None
        )  # here to stay, whatever becomes of transports
        self._network = network(options.topology) if emulated else None
        self._key = link_key(token, run)
        self._options = options
        self._listener = LinkListener(options.listen)
        self._on_ready, self._on_failure, self._on_refusal = on_ready, on_failure, on_refusal
        self._lock = threading.Lock()
        self._next: tuple[Decision, int] | None = None
        self._wake = threading.Condition(self._lock)
        self._building: Built | None = None
        self._abandoned = False
        self._current: tuple[int, Built] | None = None
        self._refusal: tuple[int, Unsupported] | None = None
        self._closed = False
        self._old: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._work, name="ringhold-epochs", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that other members reach this one's links at."""
        return self._options.advertise or self._options.listen, self._listener.address[1]

    def transport(self, epoch: int) -> Transport | None:
        """Return the transport of that epoch if it is ready.

        Raises:
            Unsupported: there can be none; as of this epoch this member can do nothing.

        """
        with self._lock:
            if self._refusal is not None and self._refusal[0] == epoch:
                raise self._refusal[1]
            return self._current[1] if self._current and self._current[0] == epoch else None

    def spawn(self, command: Sequence[str], environ: Mapping[str, str], count: int) -> None:
        """Start processes that can join; errors as `MpiTransport.spawn`, and where the transport knows no ranks."""
        if self.kind != "mpi":
            raise Unsupported(f"transport {self.kind!r} spawns nothing; start another process, and it joins by itself")
        MpiTransport.spawn(command, environ, count, self._options.join_timeout)

    def fence(self) -> None:
        """Abort what is in use and what is being built; does not block."""
        with self._lock:
            self._next = None
            self._abandoned = True
            for transport in (self._building, self._current and self._current[1]):
                if transport is not None:
                    transport.abort()

    def advance(self, decision: Decision, member: int) -> None:
        """Build the transport of a new epoch, in which we are `member`; does not block."""
        with self._wake:
            self._next = (decision, member)
            self._abandoned = True
            if self._building is not None:
                self._building.abort()
            self._wake.notify_all()

    def close(self) -> None:
        """Take everything down; blocks for a short bounded time."""
        with self._wake:
            self._closed = self._abandoned = True
            if self._building is not None:
                self._building.abort()
            self._wake.notify_all()
        self._thread.join(5.0)
        self._retire_current()
        self.arena = None
        for thread in self._old:
            thread.join(5.0)
        self._listener.close()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._next is not None)
                if self._closed:
                    return
                assert self._next is not None
                decision, member = self._next
                self._next, self._abandoned = None, False
            self._retire_current()
            self._build(decision, member)

    def _build(self, decision: Decision, member: int) -> None:
        transport: Built | None = None
        failure: TransportLost | OSError | Unsupported | None = None
        try:
            transport = self._make(decision, member)
            transport.connect(self._options.op_timeout)
        except (TransportLost, OSError, Unsupported) as error:  # OSError: no descriptor left, for one
            failure = error.with_traceback(None)  # which would keep gloo's objects alive, in a circle with `failure`
        with self._lock:
            self._building, abandoned = None, self._abandoned
            if failure is None and transport is not None:
                self._current = (decision.epoch, transport)
            if isinstance(failure, Unsupported):
                self._refusal = (decision.epoch, failure)
        if failure is None:
            self._on_ready(decision.epoch)
            return
        if transport is not None:
            self._retire(transport)
        if isinstance(failure, Unsupported):
            self._on_refusal()
        elif not abandoned:
            log.warning("epoch %d could not be built: %s", decision.epoch, failure)
            peer = failure.peer if isinstance(failure, TransportLost) else None
            self._on_failure(decision.epoch, 0 if peer is None else decision.members[peer].member)

    def _make(self, decision: Decision, member: int) -> Built:
        rank = [info.member for info in decision.members].index(member)
        addresses = [(info.host, info.port) for info in decision.members]
        make = TRANSPORTS[self.kind]
        listen = self._options.listen
        transport: Built = make(
            Site(
                self._listener,
                rank,
                addresses,
                self._key,
                decision.epoch,
                decision.nonce,
                listen,
                self._stripes,
                self._checked,
            )
        )
        if self._checked and self.kind != "sockets":  # whose links check all of it
            transport = CheckedTransport(transport)
        if self._network is not None:
            transport = emulate(transport, self._network, self._key, decision.epoch, decision.nonce)
        with self._lock:
            self._building = transport
            if self._abandoned:
                transport.abort()
        return transport

    def _retire_current(self) -> None:
        with self._lock:
            old, self._current = self._current, None
        if old is not None:
            self._retire(old[1])

    def _retire(self, transport: Built) -> None:
        """Close a transport in a thread of its own: gloo may take its time, and the next epoch must not wait for it."""
        self._old = [thread for thread in self._old if thread.is_alive()]
        self._old.append(threading.Thread(target=transport.close, name="ringhold-retire", daemon=True))
        self._old[-1].start()


def parse_transport(name: str) -> tuple[str, int, bool, bool]:
    """A transport's plain name, its number of stripes, whether it is emulated and whether checked: "checked:gloo:4".

    Raises:
        OptionError: there is no such transport.

    """
    unshaped = name.removeprefix(PREFIX)
    plain = unshaped.removeprefix(CHECKED)
    kind, colon, number = plain.partition(":")
    if kind not in TRANSPORTS:
        raise OptionError(f"unknown transport {name!r}; there are {', '.join(sorted(TRANSPORTS))}")
    if colon and (kind != "gloo" or not number.isdecimal() or not 0 < int(number) <= MOST_STRIPES):
        raise OptionError(f"transport {name!r}: only gloo has stripes, 1 to {MOST_STRIPES}, such as gloo:4")
    if plain != unshaped and kind not in CHECKABLE:
        raise OptionError(f"transport {name!r}: checksums of tensor data are for {' and '.join(CHECKABLE)}")
    return kind, int(number or 1), unshaped != name, plain != unshaped
