"""Damage on the wire is noticed: always in heads and small frames, in tensor data over checked transports."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from collectives import faults
from collectives.epochs import parse_transport
from collectives.errors import OptionError, TransportLost
from collectives.transports.base import DONE, Pending, Transport
from collectives.transports.checked import CheckedTransport
from collectives.transports.handshake import link_key
from collectives.transports.links import PeerLinks
from collectives.transports.mesh import LinkListener
from collectives.transports.site import Site

SOON = 5.0
LARGE = 300_000
Linked = Callable[[bool], tuple[PeerLinks, PeerLinks]]


@pytest.fixture
def linked() -> Iterator[Linked]:
    """Make two linked members; tell whether tensor data are checked."""
    listeners = [LinkListener() for _ in range(2)]
    made: list[PeerLinks] = []

    def link(checked: bool) -> tuple[PeerLinks, PeerLinks]:
        addresses = [listener.address for listener in listeners]
        pair = [
            PeerLinks(Site(listeners[rank], rank, addresses, link_key(b"t", "run"), 1, b"nonce", checked=checked))
            for rank in range(2)
        ]
        made.extend(pair)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda links: links.connect(SOON), pair))
        return pair[0], pair[1]

    yield link
    faults.damages.clear()
    for links in made:
        links.close()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("size", [0, 7, 4096, LARGE])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("landing", [False, True])
def test_a_flipped_bit_ends_the_link(linked: Linked, size: int, place: float, landing: bool) -> None:
    left, right = linked(True)
    flipped: list[str] = []
    faults.damage("data", place, flipped.append)
    into = memoryview(bytearray(size))
    errors: list[TransportLost] = []

    def receive() -> None:
        try:
            right.recv_into(0, 1, into) if landing else right.recv(0, 1, SOON)
        except TransportLost as error:
            errors.append(error)

    reader = threading.Thread(target=receive)
    reader.start()
    left.send(1, bytes(size), 1)
    reader.join(SOON)
    assert flipped == ["data"]
    assert [error.peer for error in errors] == [0]
    assert "damaged" in str(errors[0]) or "garbage" in str(errors[0])


def test_what_is_not_damaged_arrives_with_and_without_checksums(linked: Linked) -> None:
    left, right = linked(True)
    data = bytes(range(256)) * (LARGE // 256)
    left.send(1, data, 1)
    assert right.recv(0, 1, SOON) == data
    right._checked = False
    right.send(0, data, 2)  # who checks nothing himself can be understood
    assert left.recv(1, 2, SOON) == data


class Wire(Transport):
    """Both ends of a wire that flips a bit of each `bad`th transfer."""

    def __init__(self, bad: int) -> None:
        self.rank, self.size = 0, 2
        self.bad, self.sent = bad, 0
        self.bulk: deque[Tensor] = deque()
        self.notes: deque[bytes] = deque()

    def send(self, peer: int, data: Tensor, channel: int) -> Pending:
        self.sent += 1
        carried = data.clone()
        if self.sent == self.bad:
            carried.view(torch.uint8)[-1] ^= 1
        self.bulk.append(carried)
        return DONE

    def recv(self, peer: int, into: Tensor, channel: int) -> Pending:
        into.copy_(self.bulk.popleft())
        return DONE

    def send_note(self, peer: int, note: bytes | memoryview, channel: int) -> None:
        self.notes.append(bytes(note))

    def recv_note(self, peer: int, channel: int, timeout: float | None = None) -> bytes:
        return self.notes.popleft()

    def abort(self) -> None:
        return

    def close(self) -> None:
        return


def test_bulk_that_a_library_moves_is_compared_with_its_checksum() -> None:
    transport = CheckedTransport(Wire(bad=3))
    into = torch.zeros(1000)
    for number in range(1, 5):
        transport.send(1, torch.full((1000,), float(number)), 5).wait()
        arriving = transport.recv(1, into, 5)
        if number == 3:
            with pytest.raises(TransportLost, match="4000 bytes from rank 1 arrived damaged") as lost:
                arriving.wait()
            assert lost.value.peer == 1
        else:
            arriving.wait()
            assert torch.equal(into, torch.full((1000,), float(number)))


@pytest.mark.parametrize("name", ["checked:shm", "checked:mpi", "emulated:checked:shm"])
def test_there_are_no_checksums_where_there_is_no_wire_of_ours(name: str) -> None:
    with pytest.raises(OptionError, match="checksums of tensor data are for gloo and sockets"):
        parse_transport(name)
