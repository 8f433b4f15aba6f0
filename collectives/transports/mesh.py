"""Builds the full mesh of authenticated connections of one epoch; used by `links.PeerLinks.connect`.

The higher rank connects to the lower one's listener. A connection that is stale, silent, or speaks garbage is dropped
and harms nobody: every handshake is non-blocking, has a deadline, and their number is bounded. A refused or dropped
attempt is made again, because the other side may enter the epoch a little later.
"""

import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from collectives.errors import ProtocolError, TransportLost
from collectives.transports.handshake import Handshake

HANDSHAKE_SECONDS = 5.0
"""A connection that has not finished its handshake by then is dropped."""
MAX_HANDSHAKES = 128
"""Unfinished incoming handshakes; when more come, the oldest goes."""
_BACKLOG = 1024
_FIRST_RETRY = 0.004
_LAST_RETRY = 0.1


class LinkListener:
    """Where this process takes links from its peers, for all epochs of its life.

    `address` is the (host, port) that it is bound to. Members of the same host find it by its port as a Unix-domain
    socket too, which moves bytes at half the cost of loopback TCP. `turn` is held by whoever accepts.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        bound = tcp.getsockname()
        self.address: tuple[str, int] = (bound[0], bound[1])
        self.turn = threading.Lock()
        self._sockets = {tcp.fileno(): tcp}
        local = _local_address(self.address[1])
        if local is not None:
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sockets[unix.fileno()] = unix
            unix.bind(local)
            unix.listen(_BACKLOG)
        for sock in self._sockets.values():
            sock.setblocking(False)

    def filenos(self) -> tuple[int, ...]:
        """Descriptors of the listening sockets, for poll."""
        return tuple(self._sockets)

    def accept(self, fileno: int) -> socket.socket | None:
        """Take the next connection that waits at one of them, non-blocking; None if there is none."""
        try:
            sock, _ = self._sockets[fileno].accept()
        except OSError:
            return None  # nobody waits, or whoever did is gone already
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        """Stop listening."""
        for sock in self._sockets.values():
            sock.close()


def _local_address(port: int) -> bytes | None:
    """The name of a listener's Unix-domain socket: abstract, so that it ends with its process. Linux only.

    Anybody on the host may bind or connect to it, as to a port of the loopback interface: what counts is the handshake.
    """
    return b"\0ringhold-link-%d" % port if sys.platform == "linux" else None


class _Attempt:
    """One connection in the middle of its handshake."""

    def __init__(self, sock: socket.socket, handshake: Handshake, opened: bool) -> None:
        self.sock = sock
        self.handshake = handshake
        self.opened = opened
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self._data = b""

    def advance(self) -> bool:
        """Do what can be done without waiting; True when the handshake is done. OSError or ProtocolError: drop it."""
        if not self.opened:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, "connect failed")
            self.opened = True
            self._send(self.handshake.opening)
            return False
        while not self.handshake.done:
            try:
                data = self.sock.recv(self.handshake.want - len(self._data))
            except BlockingIOError:
                return False
            if not data:
                raise ProtocolError("the connection was closed during its handshake")
            self._data += data
            if len(self._data) == self.handshake.want:
                answer = self.handshake.feed(self._data)
                self._data = b""
                self._send(answer)
        return True

    def _send(self, data: bytes) -> None:
        # A fresh connection takes these few bytes at once; one that does not is not worth waiting for.
        if data and self.sock.send(data) != len(data):
            raise ProtocolError("the connection did not take a handshake message")


class MeshBuilder:
    """Links rank `rank` with all others. `wake` is a descriptor that turns readable when the build must end."""

    def __init__(
        self,
        listener: LinkListener,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        handshake: Callable[[int | None], Handshake],
        wake: int,
    ) -> None:
        self._listener = listener
        self._rank = rank
        self._addresses = addresses
        self._handshake = handshake
        self._wake = wake
        self._poll = select.poll()
        self._attempts: dict[int, _Attempt] = {}
        self._linked: dict[int, socket.socket] = {}
        self._local = dict.fromkeys(range(rank), False)
        self._due = dict.fromkeys(range(rank), 0.0)
        self._pause = dict.fromkeys(range(rank), _FIRST_RETRY)

    def build(self, timeout: float) -> dict[int, socket.socket]:
        """Return a connected, authenticated, non-blocking socket for every other rank.

        Raises:
            TransportLost: woken up (`peer` None), or `peer` could not be linked with in `timeout` seconds.

        """
        deadline = time.monotonic() + timeout
        self._take_turn(deadline)
        try:
            self._poll.register(self._wake, select.POLLIN)
            for fd in self._listener.filenos():
                self._poll.register(fd, select.POLLIN)
            while len(self._linked) < len(self._addresses) - 1:
                self._round(deadline)
        except BaseException:
            for sock in self._linked.values():
                sock.close()
            raise
        finally:
            for attempt in self._attempts.values():
                attempt.sock.close()
            self._listener.turn.release()
        return self._linked

    def _take_turn(self, deadline: float) -> None:
        """Wait until the build of an earlier epoch, aborted but still on its way out, has let go of the listener."""
        while not self._listener.turn.acquire(timeout=0.01):
            if select.select([self._wake], [], [], 0)[0]:
                raise TransportLost("linking with the peers was aborted")
            if time.monotonic() > deadline:
                raise TransportLost("linking with the peers timed out: an earlier epoch still holds the listener")

    def _round(self, deadline: float) -> None:
        now = time.monotonic()
        if now > deadline:
            missing = min(set(range(len(self._addresses))) - set(self._linked) - {self._rank})
            host, port = self._addresses[missing]
            raise TransportLost(f"no link with rank {missing} at {host}:{port} came about in time", missing)
        for peer in [peer for peer, due in self._due.items() if due <= now]:
            self._connect(peer)
        for fd in [fd for fd, attempt in self._attempts.items() if attempt.deadline <= now]:
            self._drop(fd)
        next_event = min(
            [deadline, *self._due.values(), *(attempt.deadline for attempt in self._attempts.values())],
        )
        for fd, _ in self._poll.poll(max(0.0, next_event - time.monotonic()) * 1000 + 1):
            if fd == self._wake:
                raise TransportLost("linking with the peers was aborted")
            if fd in self._attempts:
                self._advance(fd)
            elif fd in self._listener.filenos():
                self._accept(fd)

    def _connect(self, peer: int) -> None:
        """Begin an attempt: by turns within this host, where the peer may be and may not, and by TCP."""
        del self._due[peer]
        self._local[peer] = not self._local[peer]
        sock = (self._connect_local(peer) if self._local[peer] else None) or self._connect_tcp(peer)
        if sock is None:
            self._retry(peer)
        else:
            self._watch(_Attempt(sock, self._handshake(peer), opened=False))

    def _connect_local(self, peer: int) -> socket.socket | None:
        address = _local_address(self._addresses[peer][1])
        if address is None:
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        if sock.connect_ex(address) == 0:
            return sock
        sock.close()  # no such listener here: the peer is on another host
        return None

    def _connect_tcp(self, peer: int) -> socket.socket | None:
        host, port = self._addresses[peer]
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(family, kind, proto)
        except OSError:
            return None
        sock.setblocking(False)
        sock.connect_ex(address)  # how it went is seen when the socket turns writable
        return sock

    def _accept(self, fileno: int) -> None:
        while (sock := self._listener.accept(fileno)) is not None:
            incoming = [fd for fd, attempt in self._attempts.items() if attempt.handshake.opening == b""]
            if len(incoming) >= MAX_HANDSHAKES:
                self._drop(incoming[0])
            self._watch(_Attempt(sock, self._handshake(None), opened=True))

    def _watch(self, attempt: _Attempt) -> None:
        self._attempts[attempt.sock.fileno()] = attempt
        self._poll.register(attempt.sock, select.POLLIN if attempt.opened else select.POLLOUT)

    def _advance(self, fd: int) -> None:
        attempt = self._attempts[fd]
        try:
            if not attempt.advance():
                self._poll.modify(fd, select.POLLIN)
                return
        except (OSError, ProtocolError):
            self._drop(fd)
            return
        del self._attempts[fd]
        self._poll.unregister(fd)
        peer = attempt.handshake.peer
        assert peer is not None
        if peer in self._linked:  # it gave an earlier attempt up and tried again
            self._linked[peer].close()
        self._linked[peer] = attempt.sock

    def _drop(self, fd: int) -> None:
        attempt = self._attempts.pop(fd)
        self._poll.unregister(fd)
        attempt.sock.close()
        peer = attempt.handshake.peer
        if attempt.handshake.opening and peer is not None:
            self._retry(peer)

    def _retry(self, peer: int) -> None:
        self._due[peer] = time.monotonic() + self._pause[peer]
        self._pause[peer] = min(_LAST_RETRY, 2 * self._pause[peer])
