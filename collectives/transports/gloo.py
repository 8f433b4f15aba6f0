"""The transport of ordinary processes: bulk over gloo's point-to-point operations, notes over the links.

Built by the membership for each epoch. What one has to know about gloo: a receive blocks for ever when its peer is
stopped, and when a rank that is no neighbour dies; neither `abort` nor `shutdown` of the group wakes it. What does is a
receive that *times out*: gloo then closes every connection of that context, and whatever is blocked in it raises, but
for operations whose bytes are half way. So `abort` wakes each wait by itself (`gloo_wake`), and closes the connections
by such a timeout ("poison"), from a thread of its own.

Two members may have several connections, stripes, which take the segments by turns: for links that one stream of TCP
does not fill. Each is a process group of its own.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from collectives.errors import RingholdError, TransportLost
from collectives.transports.base import CHANNELS, Pending, Transport
from collectives.transports.gloo_wake import can_wake, wake
from collectives.transports.links import PeerLinks, Posted
from collectives.transports.site import Site
from collectives.transports.store import LinkStore

INLINE_LIMIT = 2**20
_PATIENCE = timedelta(days=30) if can_wake() else timedelta(seconds=60)
"""Waits end by `abort` alone; gloo needs a number. Where `abort` cannot wake them all, it must be a small one."""
_POISON_TAG = CHANNELS
_CLOSE_SECONDS = 2.0
_BUILD_SECONDS = 15.0
"""Gloo connects in milliseconds, or hangs because a peer went; a thread that is left behind in it ends after this."""


class _GlooPending(Pending):
    """A posted operation. It leaves its transport's table when done; else the transport keeps it, memory and all."""

    __slots__ = ("_peer", "_transport", "data", "work")

    def __init__(self, transport: "GlooTransport", work: dist.Work, data: Tensor, peer: int) -> None:
        self.work: dist.Work | None = work
        self.data: Tensor | None = data
        self._transport = transport
        self._peer = peer

    def wait(self) -> None:
        work = self.work
        if work is None:
            raise TransportLost("the transport of this operation was closed")
        try:
            done = work.wait(_PATIENCE)
        except RuntimeError as error:
            raise self._transport.lost(error, self._peer) from None
        if not done:
            raise TransportLost("the transport of this epoch was aborted")
        self._transport.settled(self)
        self.drop()

    def drop(self) -> None:
        """Let go of gloo's objects, so that a caller who keeps this one does not keep the whole group alive."""
        self.work = self.data = None


class GlooTransport(Transport):
    """Moves one epoch's bytes through gloo process groups of its own.

    Call `connect` once before use. `abort` may come at any time, also during `connect`.
    """

    inline_limit = INLINE_LIMIT

    def __init__(self, site: Site) -> None:
        self.rank, self.size = site.rank, site.size
        self._hostname = site.hostname
        self._links = PeerLinks(site)
        self._stripes = site.stripes
        self._groups: list[Any] = []  # of ProcessGroupGloo; the stubs do not know its send and recv
        self._turns: Counter[tuple[str, int, int]] = Counter()
        self._lock = threading.Lock()
        self._inflight: set[_GlooPending] = set()
        self._built = threading.Event()
        self._aborted = False
        self._closed = False
        self._helpers: list[threading.Thread] = []

    def connect(self, timeout: float) -> None:
        """Link with all peers and build the process group.

        Raises:
            TransportLost: aborted (`peer` None), or `peer` did not link in `timeout` seconds.

        """
        self._links.connect(timeout)
        if self.size == 1:
            return
        failure: list[Exception] = []

        def build() -> None:
            try:
                self._build(min(timeout, _BUILD_SECONDS))
            except (RuntimeError, RingholdError) as error:
                failure.append(error.with_traceback(None))  # it would keep gloo's objects alive, in a circle
            finally:
                self._built.set()

        # Gloo's own connecting cannot be interrupted: if it is stuck when `abort` comes, its thread is left behind and
        # ends by its own timeout.
        self._help(build, "ringhold-build")
        self._built.wait()
        self._refuse()
        if failure:
            peer = failure[0].peer if isinstance(failure[0], TransportLost) else None
            raise TransportLost(f"gloo could not connect: {failure[0]}", peer)

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """Post a bulk send; see `Transport.send`."""
        return self._post("send", peer, data, channel)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """Post a bulk receive; see `Transport.recv`. A peer that sends more ends this process: agree first."""
        return self._post("recv", peer, into, channel)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """Send a note; see `Transport.send_note`."""
        self._links.send(peer, note, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """Receive a note; see `Transport.recv_note`."""
        return self._links.recv(peer, channel, timeout)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """Post a note; see `Transport.post_note`."""
        pending = self._links.post(peer, note, channel)
        if isinstance(pending, Posted):  # while this thread waits in gloo, nobody else might move it
            self._links.flush_behind(peer)
        return pending

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """Receive a note into memory; see `Transport.recv_note_into`."""
        self._links.recv_into(peer, channel, into)

    def abort(self) -> None:
        """Give the epoch up; see `Transport.abort`. What is blocked raises within tens of milliseconds."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            groups = list(self._groups)
            inflight = [pending.work for pending in self._inflight]
        self._links.abort()
        self._built.set()
        for work in inflight:
            if work is not None:
                wake(work)
        for group in groups:
            self._help(partial(_poison, group), "ringhold-poison")

    def close(self) -> None:
        """Free everything; see `Transport.close`. Waits for two seconds at most."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clean = not self._inflight and not self._aborted
        deadline = time.monotonic() + _CLOSE_SECONDS
        if clean:  # nothing is blocked: let notes on their way out go, and spare gloo the poison
            self._links.close()
            self._aborted = True
        else:
            self.abort()
            self._links.close()
        self._join(deadline)
        self._help(self._destroy, "ringhold-destroy")
        self._join(deadline)

    def settled(self, pending: _GlooPending) -> None:
        """Take note that `pending` is done: its memory is the caller's again."""
        with self._lock:
            self._inflight.discard(pending)

    def lost(self, error: Exception, peer: int) -> TransportLost:
        """Return what to raise for gloo's `error` on the link to `peer`."""
        if self._aborted:
            return TransportLost("the transport of this epoch was aborted")
        return TransportLost(f"the bulk link to rank {peer} failed: {error}", peer)

    def _post(self, operation: str, peer: int, data: Tensor, channel: int) -> Pending:
        self._refuse()
        try:
            work = getattr(self._next_group(operation, peer, channel), operation)([data], peer, channel)
        except RuntimeError as error:
            raise self.lost(error, peer) from None
        pending = _GlooPending(self, work, data, peer)
        with self._lock:
            self._inflight.add(pending)
        self._refuse()  # `abort` may have been too early to see it
        return pending

    def _next_group(self, operation: str, peer: int, channel: int) -> Any:
        """The stripes by turns: both ends post in the same order, so that they take the same one."""
        if self._stripes == 1:
            return self._groups[0]
        turn = self._turns[operation, peer, channel]
        self._turns[operation, peer, channel] = turn + 1
        return self._groups[turn % self._stripes]

    def _refuse(self) -> None:
        if self._aborted or self._closed:
            raise TransportLost("the transport of this epoch was aborted")

    def _build(self, timeout: float) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs call it Options
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._hostname, lazy_init=False)]
        options._threads = 1  # they run gloo's collectives, which are not used here
        options._timeout = timedelta(seconds=timeout)
        store = LinkStore(self._links, timeout)
        for stripe in range(self._stripes):
            group = dist.ProcessGroupGloo(PrefixStore(str(stripe), store), self.rank, self.size, options)
            with self._lock:
                if not self._aborted:
                    self._groups.append(group)

    def _destroy(self) -> None:
        with self._lock:
            pending, self._inflight = self._inflight, set()
            groups, self._groups = self._groups, []
        for one in pending:
            one.drop()
        del groups, pending

    def _help(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._helpers.append(thread)
        thread.start()

    def _join(self, deadline: float) -> None:
        for thread in self._helpers:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._helpers = [thread for thread in self._helpers if thread.is_alive()]


def _poison(group: Any) -> None:
    """Make everything that is blocked in `group` raise: a timeout closes all connections of its context."""
    try:
        group.recv_anysource([torch.zeros(1, dtype=torch.uint8)], _POISON_TAG).wait(timedelta(milliseconds=1))
    except RuntimeError:
        return  # as intended
    raise AssertionError("a receive that nobody answers was answered")
