"""A transport that notes every hop in a trace, around the one that moves the bytes. Made by `collectives.trace`.

One for each attempt of an operation. Both ends count the messages between them, so that sender and receiver find the
same name for a hop without a word.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from collectives.transports.base import Pending, Transport


def now() -> float:
    """Return microseconds of the clock that all processes of a host share."""
    return time.monotonic_ns() / 1e3


class Recorder(Protocol):
    """Takes what is seen; `collectives.trace.Passage` is one."""

    def span(self, name: str, begun: float, about: dict[str, Any], /) -> None:
        """Something took from `begun`, microseconds of the monotonic clock, till now."""

    def arrow(self, flow: str, leaves: bool, /) -> None:
        """A hop of that name leaves, or arrives."""


class TracedTransport(Transport):
    """A view of a transport. It owns nothing.

    Args:
        inner: moves the bytes.
        recorder: is told of every message.
        prefix: names the attempt, alike on all members.
        members: member ids by rank.

    """

    def __init__(self, inner: Transport, recorder: Recorder, prefix: str, members: Sequence[int]) -> None:
        self._inner, self._recorder, self._prefix, self._members = inner, recorder, prefix, members
        self._sent: Counter[tuple[str, int]] = Counter()
        self._received: Counter[tuple[str, int]] = Counter()
        self.rank, self.size = inner.rank, inner.size
        self.inline_limit, self.segment_bytes, self.lends = inner.inline_limit, inner.segment_bytes, inner.lends

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        """See `Transport.send`."""
        self._leaves("bulk", peer)
        return self._inner.send(peer, data, channel)

    def lend(self, peer: int, data: Tensor, channel: int) -> None:
        """See `Transport.lend`."""
        self._leaves("bulk", peer)
        self._inner.lend(peer, data, channel)

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        """See `Transport.recv`."""
        flow = self._name(self._received, "bulk", peer, self.rank, peer)
        return _Arriving(self._recorder, self._inner.recv(peer, into, channel), flow, self._members[peer], into.nbytes)

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        """See `Transport.send_note`."""
        self._leaves("note", peer)
        self._inner.send_note(peer, note, channel)

    def post_note(self, peer: int, note: memoryview, channel: int) -> Pending:
        """See `Transport.post_note`."""
        self._leaves("note", peer)
        return self._inner.post_note(peer, note, channel)

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        """See `Transport.recv_note`."""
        begun = now()
        note = self._inner.recv_note(peer, channel, timeout)
        self._note_arrived(peer, begun, len(note))
        return note

    def recv_note_into(self, peer: int, into: memoryview, channel: int) -> None:
        """See `Transport.recv_note_into`."""
        begun = now()
        self._inner.recv_note_into(peer, into, channel)
        self._note_arrived(peer, begun, len(into))

    def abort(self) -> None:
        """Leave the epoch alone: only the membership gives it up."""

    def close(self) -> None:
        """Free nothing."""

    def _note_arrived(self, peer: int, begun: float, size: int) -> None:
        self._recorder.arrow(self._name(self._received, "note", peer, self.rank, peer), False)
        self._recorder.span(f"note from {self._members[peer]}", begun, {"bytes": size})

    def _leaves(self, kind: str, peer: int) -> None:
        self._recorder.arrow(self._name(self._sent, kind, self.rank, peer, peer), True)

    def _name(self, counts: Counter[tuple[str, int]], kind: str, source: int, target: int, peer: int) -> str:
        counts[kind, peer] += 1
        return f"{self._prefix} {kind} {self._members[source]}>{self._members[target]} {counts[kind, peer]}"


class _Arriving(Pending):
    """A receive that is noted when it is waited for."""

    __slots__ = ("_flow", "_inner", "_member", "_recorder", "_size")

    def __init__(self, recorder: Recorder, inner: Pending, flow: str, member: int, size: int) -> None:
        self._recorder, self._inner, self._flow, self._member, self._size = recorder, inner, flow, member, size

    def wait(self) -> None:
        begun = now()
        self._inner.wait()
        self._recorder.arrow(self._flow, False)
        self._recorder.span(f"bulk from {self._member}", begun, {"bytes": self._size})
