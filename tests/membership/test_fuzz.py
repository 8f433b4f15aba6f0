"""Bytes of strangers: whatever comes, decoders answer with the error that closes the connection, and no other."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.descriptor import Descriptor
from collectives.descriptor import decode as decode_header
from collectives.errors import ProtocolError
from collectives.membership.protocol import (
    Beat,
    Decision,
    Join,
    LaneFrontier,
    LaneReport,
    LaneStatus,
    MemberInfo,
    Prepare,
    Proof,
    Report,
    Resume,
    Verdict,
    decode_from_coordinator,
    decode_from_peer,
    encode,
)
from collectives.transports.frames import MAX_NOTE, Link
from collectives.transports.handshake import Handshake

MESSAGES = [
    Proof(1, "run", bytes(16), bytes(32)),
    Join(bytes(16), "127.0.0.1", 4000, "gloo"),
    Resume(3, bytes(16), 7, 8),
    Beat([LaneStatus("main", 5, "all_reduce", "moving", 2, 0.5, (1, 2))]),
    Report(4, {"main": LaneReport(1, 2, 3, 4, 5, 6, (7,))}),
    Prepare(9, [1, 2, 3]),
    Decision(
        2,
        bytes(16),
        [MemberInfo(1, bytes(16), "host", 1, True)],
        [2],
        [1],
        {"main": LaneFrontier(1, 2, 3)},
        [Verdict("main", 4, "lost", "text")],
        True,
        5,
        "gloo",
    ),
]
FRAME = b"\x05\x00\x00\x00\x01\x00\x00\x00"  # how a note of 5 bytes on channel 1 begins
Mutation = tuple[int, int]

fuzz = settings(max_examples=300, derandomize=True, deadline=None, database=None)
mutations = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6)


def mutated(data: bytes, changes: list[Mutation], cut: int) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    return bytes(changed[: len(changed) - cut % len(changed)])


def only_protocol_errors(decode: Callable[[bytes], Any], data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@fuzz
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (decode_from_peer, decode_from_coordinator, decode_header):
        only_protocol_errors(decode, data)


@fuzz
@given(st.sampled_from(MESSAGES), mutations, st.integers(0, 3))
def test_any_change_of_a_message_is_a_message_or_a_protocol_error(
    message: Any, changes: list[Mutation], cut: int
) -> None:
    data = mutated(encode(message), changes, cut)
    for decode in (decode_from_peer, decode_from_coordinator):
        only_protocol_errors(decode, data)


@fuzz
@given(mutations, st.integers(0, 3))
def test_any_change_of_a_header_is_a_header_or_a_protocol_error(changes: list[Mutation], cut: int) -> None:
    header = Descriptor(1, "main", 2, 3, "all_reduce", "float32", (4, 5), "sum", 0, "ring", "retry")
    only_protocol_errors(decode_header, mutated(header.encode(), changes, cut))


@fuzz
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8), st.booleans())
def test_a_link_takes_any_bytes_for_notes_or_is_lost(pieces: list[bytes], framed: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        theirs.setblocking(False)
        link = Link(theirs, 1)
        notes = []
        for piece in pieces:
            with contextlib.suppress(BrokenPipeError):
                ours.sendall(FRAME + piece if framed else piece)
            if link.lost is None:
                notes += link.read()
        sent = sum(map(len, pieces))
        assert not notes  # a checksum of 32 bits is not met by chance
        if link.lost is None:
            assert sent + len(FRAME) * framed * len(pieces) < 16 + MAX_NOTE


@fuzz
@given(st.binary(min_size=200, max_size=200), st.booleans())
def test_a_handshake_refuses_what_is_none(data: bytes, connector: bool) -> None:
    handshake = Handshake(b"key", 1, b"nonce", 0 if not connector else 1, 2, 0 if connector else None)
    with pytest.raises(ProtocolError):
        while not handshake.done:
            handshake.feed(data[: handshake.want])
