"""Notes through shared memory: every note once, whole and in order, however full the rings; bells and other memory."""

import ctypes
import os
import random
import threading
import time

import pytest

from collectives.transports.mailbox import LONGEST, RING, Inbox, Outbox, Segment, make_segment
from collectives.transports.remote import WORD_BYTES, RemoteMemory

NONCE = b"n" * 16


class Pair:
    """Two members' segments in one process, as each maps them."""

    def __init__(self) -> None:
        descriptors = [make_segment(2), make_segment(2)]
        self.own = [Segment(descriptors[rank], 2, rank, own=True) for rank in range(2)]
        self.seen = [Segment(descriptors[rank], 2, rank, own=False) for rank in range(2)]
        for descriptor in descriptors:
            os.close(descriptor)
        self.outbox = Outbox(self.own[0], self.seen[1])
        self.inbox = Inbox(self.own[1], self.seen[0])


@pytest.mark.parametrize("seed", range(5))
def test_every_note_arrives_once_whole_and_in_order(seed: int) -> None:
    chance, pair = random.Random(seed), Pair()
    sent, got = [], []
    for number in range(2000):
        size = chance.choice([0, 1, 15, 16, 17, 100, 3000, LONGEST, LONGEST + 1, 2 * RING])
        note = (chance.randrange(3), chance.randrange(2**31), number.to_bytes(4) + chance.randbytes(size))
        sent.append(note)
        pair.outbox.put(*note)
        if chance.random() < 0.4:
            got += pair.inbox.take()
            pair.outbox.flush()
    while pair.outbox.full:
        got += pair.inbox.take()
        pair.outbox.flush()
    assert got + pair.inbox.take() == sent


def test_a_frame_of_which_not_all_is_there_is_not_taken() -> None:
    pair = Pair()
    pair.outbox.put(0, 7, b"the first")
    ring = pair.own[0].ring_to(1)
    byte = pair.own[0].memory[ring + 18]
    pair.own[0].memory[ring + 18] = byte ^ 1
    assert pair.inbox.take() == []
    pair.own[0].memory[ring + 18] = byte
    assert pair.inbox.take() == [(0, 7, b"the first")]


def test_a_frame_of_an_earlier_round_of_the_ring_is_not_taken() -> None:
    pair = Pair()
    for _ in range(RING // 32):
        pair.outbox.put(0, 7, b"x" * 16)
    assert len(pair.inbox.take()) == RING // 32
    pair.own[0].set_written(1, RING + 32)  # the count is there before the bytes
    assert pair.inbox.take() == []


def test_a_full_ring_is_told_when_it_is_read() -> None:
    pair = Pair()
    while not pair.outbox.full:
        pair.outbox.put(0, 1, b"x" * 1000)
    rung = pair.own[0].doorbell.count[0]
    assert pair.inbox.take()
    assert pair.own[0].doorbell.count[0] > rung
    pair.outbox.flush()
    assert not pair.outbox.full


def test_a_bell_wakes_who_sleeps_and_is_not_missed() -> None:
    pair = Pair()
    bell, seen = pair.own[0].doorbell, pair.seen[0].doorbell
    count = bell.count[0]
    seen.ring()
    begun = time.monotonic()
    bell.sleep(count)  # rung meanwhile
    sleeper = threading.Thread(target=bell.sleep, args=(bell.count[0],))
    sleeper.start()
    time.sleep(0.05)
    seen.ring()
    sleeper.join(0.5)
    assert not sleeper.is_alive()
    assert time.monotonic() - begun < 0.9, "it slept as long as it may"
    bell.sleep(bell.count[0], 0.01)


def test_other_memory_is_read_as_long_as_its_owner_means_it() -> None:
    segment = Pair().own[0]
    word = segment.mark(NONCE, 3, valid=True)
    data, into = ctypes.create_string_buffer(b"data", 4), ctypes.create_string_buffer(4)
    own = RemoteMemory(os.getpid(), segment.word_address, word)
    assert own.may_read()
    assert own.read(ctypes.addressof(data), ctypes.addressof(into), 4)
    assert into.raw == b"data"
    for other in (b"?" * WORD_BYTES, segment.expects(NONCE, 4), segment.expects(b"m" * 16, 3)):
        assert not RemoteMemory(os.getpid(), segment.word_address, other).read(
            ctypes.addressof(data), ctypes.addressof(into), 4
        )
    segment.mark(NONCE, 3, valid=False)
    assert not own.read(ctypes.addressof(data), ctypes.addressof(into), 4)
    assert not own.read(8, ctypes.addressof(into), 4), "nothing is mapped there"


def test_the_memory_of_a_dead_process_is_no_other_ones() -> None:
    segment = Pair().own[0]
    word = segment.mark(NONCE, 3, valid=True)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    memory = RemoteMemory(child, segment.word_address, word)
    assert not memory.may_read()
    with pytest.raises(ProcessLookupError):
        memory.read(segment.word_address, 0, 0)
