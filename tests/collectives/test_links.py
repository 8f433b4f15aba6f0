"""Links over real sockets: who gets in, what arrives, and what happens when somebody does not."""

import itertools
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from collectives.errors import OperationTimeout, ProtocolError, TransportLost
from collectives.transports import mesh
from collectives.transports.frames import MAX_NOTE
from collectives.transports.handshake import Handshake, link_key
from collectives.transports.links import PeerLinks
from collectives.transports.mesh import MAX_HANDSHAKES, LinkListener
from collectives.transports.site import Site

KEY = link_key(b"token", "run")
NONCE = b"nonce"
SOON = 5.0
epochs = itertools.count(1)


@pytest.fixture(params=["unix", "tcp"], autouse=True)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs within a host, and as between hosts."""
    if request.param == "tcp":
        monkeypatch.setattr(mesh, "_local_address", lambda port: None)
    return str(request.param)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as made:
        yield made


class Mesh:
    """Listeners and links of some ranks, all in this process."""

    def __init__(self, size: int, pool: ThreadPoolExecutor) -> None:
        self.epoch = next(epochs)
        self.listeners = [LinkListener() for _ in range(size)]
        self.addresses = [listener.address for listener in self.listeners]
        self.links = [self.make(rank) for rank in range(size)]
        self._pool = pool

    def make(self, rank: int, key: bytes = KEY, epoch: int | None = None, nonce: bytes = NONCE) -> PeerLinks:
        return PeerLinks(Site(self.listeners[rank], rank, self.addresses, key, epoch or self.epoch, nonce))

    def connect(self, timeout: float = SOON) -> list[Future[Any]]:
        return [self._pool.submit(links.connect, timeout) for links in self.links]

    def close(self) -> None:
        for links in self.links:
            links.close()
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def make(pool: ThreadPoolExecutor) -> Iterator[Callable[[int], Mesh]]:
    made: list[Mesh] = []

    def factory(size: int) -> Mesh:
        made.append(Mesh(size, pool))
        return made[-1]

    yield factory
    for one in made:
        one.close()


@pytest.fixture
def pair(make: Callable[[int], Mesh]) -> tuple[PeerLinks, PeerLinks]:
    """Two linked members, ranks 0 and 1."""
    made = make(2)
    for done in made.connect():
        done.result(SOON)
    return made.links[0], made.links[1]


def test_everybody_is_linked_with_everybody(make: Callable[[int], Mesh], family: str) -> None:
    made = make(4)
    for done in made.connect():
        done.result(SOON)
    for source, target in itertools.permutations(range(4), 2):
        made.links[source].send(target, b"%d to %d" % (source, target), 7)
    for source, target in itertools.permutations(range(4), 2):
        assert made.links[target].recv(source, 7, SOON) == b"%d to %d" % (source, target)
    expected = socket.AF_UNIX if family == "unix" else socket.AF_INET
    assert {link._sock.family for link in made.links[0]._links.values()} == {expected}


def test_members_that_come_late_are_waited_for(make: Callable[[int], Mesh], pool: ThreadPoolExecutor) -> None:
    made = make(3)
    early = [pool.submit(made.links[rank].connect, SOON) for rank in (0, 2)]
    time.sleep(0.1)
    pool.submit(made.links[1].connect, SOON).result(SOON)
    for done in early:
        done.result(SOON)


@pytest.mark.parametrize("wrong", ["key", "epoch", "nonce"])
def test_who_cannot_prove_that_it_belongs_here_is_not_linked(
    make: Callable[[int], Mesh], pool: ThreadPoolExecutor, wrong: str
) -> None:
    made = make(2)
    stranger = made.make(
        1,
        key=b"other" if wrong == "key" else KEY,
        epoch=made.epoch + 1000 if wrong == "epoch" else None,
        nonce=b"other" if wrong == "nonce" else NONCE,
    )
    outside = pool.submit(stranger.connect, 1.0)
    with pytest.raises(TransportLost) as lost:
        made.links[0].connect(0.3)
    assert lost.value.peer == 1
    with pytest.raises(TransportLost) as refused:
        outside.result(SOON)
    assert refused.value.peer == 0
    stranger.close()


def test_a_member_of_an_old_epoch_disturbs_nobody(make: Callable[[int], Mesh], pool: ThreadPoolExecutor) -> None:
    made = make(2)
    stale = made.make(1, epoch=made.epoch + 1000)
    outside = pool.submit(stale.connect, SOON)
    time.sleep(0.05)
    stale.abort()
    for done in made.connect():
        done.result(SOON)
    with pytest.raises(TransportLost):
        outside.result(SOON)
    stale.close()


def test_garbage_and_silence_keep_nobody_from_linking(make: Callable[[int], Mesh]) -> None:
    made = make(2)
    rng = random.Random(1)
    strangers = [socket.create_connection(made.addresses[0]) for _ in range(MAX_HANDSHAKES + 40)]
    for number, stranger in enumerate(strangers):
        if number % 3 == 0:
            stranger.sendall(rng.randbytes(rng.randint(1, 200)))
        elif number % 3 == 1:
            stranger.sendall(Handshake(b"wrong", made.epoch, NONCE, 1, 2, 0).opening + rng.randbytes(32))
    begun = time.monotonic()
    for done in made.connect():
        done.result(SOON)
    assert time.monotonic() - begun < SOON
    made.links[0].send(1, b"hello", 1)
    assert made.links[1].recv(0, 1, SOON) == b"hello"
    for stranger in strangers:
        stranger.close()


def test_a_handshake_proves_both_ends_and_cannot_be_replayed_or_reflected() -> None:
    def ends(epoch: int = 5) -> tuple[Handshake, Handshake]:
        return Handshake(KEY, 5, NONCE, 2, 3, 1), Handshake(KEY, epoch, NONCE, 1, 3)

    connector, acceptor = ends()
    hello = connector.opening
    answer = acceptor.feed(hello)
    proof = connector.feed(answer)
    assert acceptor.feed(proof) == b""
    assert connector.done
    assert acceptor.done
    assert acceptor.peer == 2
    replayed = ends()[1]
    replayed.feed(hello)
    with pytest.raises(ProtocolError, match="could not prove"):
        replayed.feed(proof)
    reflected, acceptor = ends()
    answer = acceptor.feed(reflected.opening)
    with pytest.raises(ProtocolError, match="could not prove"):
        acceptor.feed(answer[16:])
    with pytest.raises(ProtocolError, match="was offered to rank 1 of epoch 6"):
        ends(epoch=6)[1].feed(hello)
    with pytest.raises(ProtocolError, match="does not speak this protocol"):
        ends()[1].feed(bytes(len(hello)))


def test_an_abort_ends_the_linking(make: Callable[[int], Mesh], pool: ThreadPoolExecutor) -> None:
    made = make(3)
    waiting = pool.submit(made.links[1].connect, 60.0)
    time.sleep(0.05)
    begun = time.monotonic()
    made.links[1].abort()
    with pytest.raises(TransportLost) as lost:
        waiting.result(SOON)
    assert lost.value.peer is None
    assert time.monotonic() - begun < 1.0
    again = made.make(1)  # the listener is free for the next epoch
    with pytest.raises(TransportLost, match="came about in time"):
        again.connect(0.05)
    again.close()


def test_channels_are_apart_and_each_keeps_its_order(pair: tuple[PeerLinks, PeerLinks]) -> None:
    left, right = pair
    for number in range(50):
        left.send(1, b"a%d" % number, 1)
        left.send(1, b"b%d" % number, 2)
    assert [right.recv(0, 2, SOON) for _ in range(50)] == [b"b%d" % number for number in range(50)]
    assert [right.recv(0, 1, SOON) for _ in range(50)] == [b"a%d" % number for number in range(50)]


def test_many_threads_wait_at_once(pair: tuple[PeerLinks, PeerLinks], pool: ThreadPoolExecutor) -> None:
    sizes = [0, 1, 100, 5000, 70_000, 300_000]

    def lane(links: PeerLinks, channel: int) -> int:
        total = 0
        for number in range(60):
            size = sizes[(number + channel) % len(sizes)]
            links.send(1 - links.rank, bytes([channel + number]) * size, channel)
            if number % 2:
                into = bytearray(size)
                links.recv_into(1 - links.rank, channel, memoryview(into))
                got = bytes(into)
            else:
                got = links.recv(1 - links.rank, channel, SOON)
            assert got == bytes([channel + number]) * size
            total += len(got)
        return total

    running = [pool.submit(lane, links, channel) for channel in range(6) for links in pair]
    assert len({done.result(30) for done in running}) == 1


def test_both_may_send_much_at_once(pair: tuple[PeerLinks, PeerLinks], pool: ThreadPoolExecutor) -> None:
    note = os.urandom(MAX_NOTE)

    def exchange(links: PeerLinks) -> None:
        posted = [links.post(1 - links.rank, memoryview(note), 3) for _ in range(12)]
        for one in posted:
            one.wait()
        for _ in range(12):
            links.send(1 - links.rank, note, 3)
        for _ in range(24):
            assert links.recv(1 - links.rank, 3, SOON) == note

    for done in [pool.submit(exchange, links) for links in pair]:
        done.result(30)


def test_what_was_sent_is_read_after_the_sender_has_closed(pair: tuple[PeerLinks, PeerLinks]) -> None:
    left, right = pair
    right.send(0, b"not read by the other side", 1)
    for number in range(3):
        left.send(1, b"%d" % number, 1)
    left.close()
    assert [right.recv(0, 1, SOON) for _ in range(3)] == [b"0", b"1", b"2"]
    with pytest.raises(TransportLost, match="rank 0") as lost:
        right.recv(0, 1, SOON)
    assert lost.value.peer == 0
    with pytest.raises(TransportLost) as broken:
        for _ in range(100):
            right.send(0, bytes(MAX_NOTE), 1)
    assert broken.value.peer == 0


def test_the_loss_of_one_peer_leaves_the_notes_of_others(make: Callable[[int], Mesh], pool: ThreadPoolExecutor) -> None:
    made = make(3)
    for done in made.connect():
        done.result(SOON)
    waiting = [pool.submit(made.links[0].recv, peer, 1, SOON) for peer in (1, 2)]
    time.sleep(0.05)
    made.links[1].close()
    with pytest.raises(TransportLost) as lost:
        waiting[0].result(SOON)
    assert lost.value.peer == 1
    made.links[2].send(0, b"still here", 1)
    assert waiting[1].result(SOON) == b"still here"


def test_a_receive_that_times_out_loses_nothing(pair: tuple[PeerLinks, PeerLinks], pool: ThreadPoolExecutor) -> None:
    left, right = pair
    leader = pool.submit(right.recv, 0, 1, SOON)
    with pytest.raises(OperationTimeout, match="rank 0 on channel 2"):
        right.recv(0, 2, 0.05)
    left.send(1, b"late", 2)
    left.send(1, b"later", 1)
    assert right.recv(0, 2, SOON) == b"late"
    assert leader.result(SOON) == b"later"
    with pytest.raises(OperationTimeout):
        right.recv(0, 1, 0.01)


def test_an_abort_wakes_everybody_and_refuses_all_that_comes(
    pair: tuple[PeerLinks, PeerLinks], pool: ThreadPoolExecutor
) -> None:
    left, right = pair
    unsent = [left.post(1, memoryview(bytes(MAX_NOTE)), 9) for _ in range(30)]
    waiting: list[Future[Any]] = [pool.submit(left.recv, 1, channel) for channel in range(5)]
    waiting.append(pool.submit(unsent[-1].wait))
    time.sleep(0.1)
    begun = time.monotonic()
    left.abort()
    left.abort()
    for done in waiting:
        with pytest.raises(TransportLost) as lost:
            done.result(SOON)
        assert lost.value.peer is None
    assert time.monotonic() - begun < 1.0
    for call in (lambda: left.send(1, b"", 1), lambda: left.recv(1, 1), lambda: left.post(1, memoryview(b""), 1)):
        with pytest.raises(TransportLost):
            call()
    del right


def test_a_note_that_lands_leaves_no_trace(pair: tuple[PeerLinks, PeerLinks]) -> None:
    """Memory that was offered for one note is never written by a later one."""
    left, right = pair
    size = 200_000
    for number in range(20):
        first, second = bytes([number]) * size, bytes([100 + number]) * size
        if number % 2:  # part of it is here before anybody wants it: it cannot land directly
            left.send(1, first, 1)
            left.send(1, b"nudge", 2)
            right.recv(0, 2, SOON)
        into = bytearray(size)
        landed = threading.Thread(target=right.recv_into, args=(0, 1, memoryview(into)))
        landed.start()
        if not number % 2:
            left.send(1, first, 1)
        landed.join(SOON)
        left.send(1, second, 1)
        left.send(1, b"nudge", 2)
        right.recv(0, 2, SOON)
        assert bytes(into) == first
        assert right.recv(0, 1, SOON) == second


def test_news_from_others_leaves_no_trace_of_a_note_that_is_landing(
    make: Callable[[int], Mesh], pool: ThreadPoolExecutor
) -> None:
    """A reader that looks again while its note is half here offers its memory to that one, and not to the next."""
    crew = make(3)
    for future in crew.connect():
        future.result()
    reader, slow, other = crew.links
    size = 100_000
    first, second = memoryview(b"1" * size), memoryview(b"2" * size)
    sock = slow._links[0]._sock
    frame = frame_of(first, 1)
    into = bytearray(size)
    landed = pool.submit(reader.recv_into, 1, 1, memoryview(into))
    while 1 not in reader._links[1].landings:
        time.sleep(0.001)
    sock.sendall(frame[: size // 2])
    while 1 in reader._links[1].landings:
        time.sleep(0.001)
    other.send(0, b"news", 1)
    while not reader._inbox.get((2, 1)):
        time.sleep(0.001)
    time.sleep(0.05)  # the reader goes back to its note
    sock.sendall(frame[size // 2 :])
    landed.result(SOON)
    slow.send(0, second, 1)
    slow.send(0, b"nudge", 2)
    assert reader.recv(1, 2, SOON) == b"nudge"
    assert into == first
    assert reader.recv(1, 1, SOON) == second


def frame_of(payload: memoryview, channel: int) -> bytes:
    """A large note as it is on the wire."""
    return head(len(payload), channel, 0) + payload


def head(length: int, channel: int, content: int) -> bytes:
    """A frame's header, whole in itself."""
    fields = struct.pack("<III", length, channel, content)
    return fields + struct.pack("<I", zlib.crc32(fields))


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_note_of_the_wrong_length_is_refused(pair: tuple[PeerLinks, PeerLinks], size: int) -> None:
    left, right = pair
    left.send(1, bytes(size + 1), 1)
    with pytest.raises(ProtocolError, match=f"sent {size + 1} bytes inline where {size} were due"):
        right.recv_into(0, 1, memoryview(bytearray(size)))
    with pytest.raises(ValueError, match="longer than"):
        left.send(1, bytes(MAX_NOTE + 1), 1)


def damaged(kind: str) -> bytes:
    """Bytes that follow a good handshake and are no good frame."""
    payload = b"payload"
    good = head(len(payload), 1, zlib.crc32(payload))
    return {
        "payload": good + b"pAyload",
        "channel": good[:4] + b"\2" + good[5:] + payload,
        "length": head(MAX_NOTE + 1, 1, 1),
        "large": head(100_000, 1, 12345) + bytes(100_000),
        "end": good + payload[:3],
    }[kind]


@pytest.mark.parametrize("kind", ["payload", "channel", "length", "large", "end"])
def test_a_damaged_frame_ends_the_link(pair: tuple[PeerLinks, PeerLinks], kind: str) -> None:
    left, right = pair
    sock = left._links[1]._sock
    sock.sendall(damaged(kind))
    if kind == "end":
        sock.shutdown(socket.SHUT_WR)
    with pytest.raises(TransportLost) as lost:
        right.recv(0, 1, SOON)
    assert lost.value.peer == 0


def test_closing_leaves_no_descriptors_behind(make: Callable[[int], Mesh]) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(5):
        made = make(3)
        for done in made.connect():
            done.result(SOON)
        made.links[0].send(1, b"x", 1)
        made.close()
    assert descriptors() == before
