"""The transports in real processes: order, deaths and stops, aborts, and that nothing is left behind."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.collectives.crew import KINDS, Crew, crew_of

WAKES = 2.0
"""Seconds in which everything blocked must raise after an abort; it takes tens of milliseconds."""
SIZES = [1, 3, 1000, 70_000, 600_000, 5]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """Processes for tests that leave them alive."""
    with crew_of(3) as made:
        yield made


@pytest.fixture
def victims() -> Iterator[Crew]:
    """Processes for a test that kills or stops one."""
    with crew_of(4) as made:
        yield made


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bfloat16"])
def test_bulk_arrives_whole_and_in_order(crew: Crew, kind: str, dtype: str) -> None:
    crew.connect(2, kind)
    crew.start(0, "send", peer=1, sizes=SIZES, dtype=dtype)
    crew.start(1, "receive", peer=0, sizes=SIZES, dtype=dtype)
    assert crew.reply(1).value == [True] * len(SIZES)
    assert not crew.reply(0).error


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("algorithm", ["ring", "doubling"])
def test_an_abort_frees_every_survivor_of_a_peer_that_died_or_stopped(
    victims: Crew, kind: str, blow: signal.Signals, algorithm: str
) -> None:
    victims.connect(4, kind)
    case = {"algorithm": algorithm, "kind": "all_reduce", "count": 1_500_000, "dtype": "float32"}
    for rank in range(4):
        victims.start(rank, "blocked", case=case)
    time.sleep(0.4)
    victims.kill(1, blow)
    time.sleep(0.3)
    begun = time.monotonic()
    for rank in (0, 2, 3):
        victims.start(rank, "!abort")
    for rank in (0, 2, 3):
        reply = victims.reply(rank, WAKES)
        assert reply.error == "TransportLost", reply
    assert time.monotonic() - begun < WAKES
    for rank in (0, 2, 3):
        victims.start(rank, "close")
        reply = victims.reply(rank, 5.0)
        assert not reply.error
        assert reply.seconds < 3.0


def test_the_neighbour_of_a_dead_peer_is_told_who_it_was(victims: Crew, kind: str) -> None:
    victims.connect(3, kind)
    victims.start(0, "receive", peer=1, sizes=[600_000], dtype="float32")
    victims.start(2, "note", peer=1)
    time.sleep(0.2)
    victims.kill(1, signal.SIGKILL)
    for rank in (0, 2):
        reply = victims.reply(rank, WAKES)
        assert (reply.error, reply.peer) == ("TransportLost", 1)


def test_an_abort_ends_a_connect_that_waits_for_a_member_that_never_comes(crew: Crew, kind: str) -> None:
    crew.epoch += 1
    for rank in (0, 2):
        crew.start(rank, "connect", kind=kind, rank=rank, addresses=crew.addresses, epoch=crew.epoch)
    time.sleep(0.3)
    for rank in (0, 2):
        crew.start(rank, "!abort")
        reply = crew.reply(rank, WAKES)
        assert (reply.error, reply.peer) == ("TransportLost", None)
    crew.connect(3, kind)


def test_a_member_that_is_stopped_while_gloo_connects_holds_nobody_up(victims: Crew) -> None:
    """Gloo's own connecting cannot be interrupted: the abort leaves it to a thread of its own."""
    for attempt in range(4):
        victims.epoch += 1
        for rank in range(3):
            given = {"kind": "gloo", "rank": rank, "addresses": victims.addresses[:3], "epoch": victims.epoch}
            victims.start(rank, "make", **given)
        for rank in range(3):
            assert not victims.reply(rank).error
            victims.start(rank, "link", timeout=3.0)
        time.sleep(0.002 * attempt)
        victims.kill(2, signal.SIGSTOP)
        time.sleep(0.1)
        for rank in (0, 1):
            victims.start(rank, "!abort")
        for rank in (0, 1):
            assert victims.reply(rank, WAKES).error in ("", "TransportLost")
        victims.kill(2, signal.SIGCONT)
        victims.start(2, "!abort")
        assert victims.reply(2).error in ("", "TransportLost")


def test_memory_in_flight_is_kept_until_the_transport_is_gone(crew: Crew, kind: str) -> None:
    crew.connect(2, kind)
    kept, gone = crew.run("quarantine", 1, peer=1)[0]
    assert gone
    assert kept or kind == "sockets", "a receive that nobody waits for is not in flight over sockets"
    assert crew.run("close", 2) == [None, None]


@pytest.mark.parametrize("registered", [False, True])
def test_what_an_owner_offered_and_gave_up_is_not_taken(crew: Crew, registered: bool) -> None:
    crew.connect(2, "shm")
    crew.start(0, "send", peer=1, sizes=[600_000], dtype="float32", registered=registered)
    crew.start(1, "receive", peer=0, sizes=[600_000], dtype="float32")
    assert (crew.reply(1).value, crew.reply(0).error) == ([True], "")
    crew.start(0, "send", peer=1, sizes=[600_000], dtype="float32", registered=registered)
    time.sleep(0.2)
    crew.start(0, "!abort")
    assert crew.reply(0, WAKES).error == "TransportLost"
    crew.start(1, "receive", peer=0, sizes=[600_000], dtype="float32")
    reply = crew.reply(1, WAKES)
    assert (reply.error, reply.peer) == ("TransportLost", None), "the membership decides about its owner"


def test_rebuilding_leaves_nothing_behind(crew: Crew, kind: str) -> None:
    def rebuild(times: int) -> None:
        for rank in range(3):
            given = {"kind": kind, "times": times, "addresses": crew.addresses, "epoch": crew.epoch + 1}
            crew.start(rank, "rebuild", rank=rank, **given)
        crew.epoch += times
        for rank in range(3):
            reply = crew.reply(rank)
            assert not reply.error, reply.message

    def usage() -> list[tuple[int, int, int]]:
        time.sleep(0.1)  # for the threads of the jobs themselves
        return [tuple(used) for used in crew.run("usage", 3)]

    rebuild(20)
    before = usage()
    rebuild(180)
    after = usage()
    for (threads, descriptors, resident), (threads_after, descriptors_after, resident_after) in zip(
        before, after, strict=True
    ):
        assert threads_after <= threads
        assert descriptors_after <= descriptors
        assert resident_after < resident + 16 * 1024, "KiB"
