"""The control channel over real sockets: who is let in, and what happens to frames that are not as they should be."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from collectives.errors import JoinRefused, OptionError, ProtocolError, UsageError
from collectives.membership.protocol import (
    MAX_FRAME,
    NONCE_BYTES,
    VERSION,
    Alive,
    Beat,
    Challenge,
    Granted,
    LaneStatus,
    Leave,
    Message,
    Proof,
    Refused,
    decode_from_coordinator,
    decode_from_peer,
    encode,
)
from collectives.membership.wire import (
    MAX_HANDSHAKE_FRAME,
    Channel,
    accept,
    client_tls,
    connect,
    derive_key,
    load_token,
    public_nonce,
    server_tls,
)
from collectives.options import Options

TOKEN, RUN = b"a shared secret", "run"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def serve(handler: Callable[[Streams], Awaitable[None]], peer: Callable[[int], Awaitable[None]]) -> None:
    """Run `peer` with the port of a server that handles one connection; errors of both come out."""
    handled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler((reader, writer))
            handled.set_result(None)
        except Exception as error:
            handled.set_exception(error)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        try:
            await asyncio.wait_for(peer(server.sockets[0].getsockname()[1]), 10)
        finally:
            outcome = await asyncio.gather(handled, return_exceptions=True)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]


def shake(
    *, token: bytes = TOKEN, run: str = RUN, then: Callable[[Channel, Channel], Awaitable[None]] | None = None
) -> None:
    """Connect with `token` and `run` to a coordinator that has TOKEN and RUN; go on with (peer, coordinator)."""

    async def main() -> None:
        accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        finished = asyncio.Event()

        async def handler(streams: Streams) -> None:
            accepted.set_result(await accept(*streams, TOKEN, RUN))
            await finished.wait()

        async def peer(port: int) -> None:
            try:
                channel = await connect("127.0.0.1", port, token, run, None)
                if then is not None:
                    await then(channel, await accepted)
                channel.close()
            finally:
                finished.set()

        await serve(handler, peer)

    asyncio.run(main())


def test_messages_go_both_ways_in_order() -> None:
    async def talk(peer: Channel, coordinator: Channel) -> None:
        beats = [Beat([LaneStatus("main", n, "all_reduce", "idle", 0, 0.5)]) for n in range(50)]
        for beat in beats:
            peer.send(beat)
        assert [decode_from_peer(await coordinator.receive()) for _ in beats] == beats
        coordinator.send(Alive())
        assert decode_from_coordinator(await peer.receive()) == Alive()

    shake(then=talk)


def test_another_token_is_refused_on_both_ends() -> None:
    with pytest.raises((JoinRefused, ProtocolError), match="wrong token: RINGHOLD_TOKEN must be the same"):
        shake(token=b"another secret")


def test_another_run_is_refused() -> None:
    with pytest.raises((JoinRefused, ProtocolError), match="serves run 'run', not 'other'"):
        shake(run="other")


async def _read(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4)))


def _frame(message: Message) -> bytes:
    body = encode(message)
    return len(body).to_bytes(4) + body


def answer_with(*answers: bytes) -> None:
    """Connect to something that begins like a coordinator and answers with these bytes, one after the other."""

    async def main() -> None:
        async def handler(streams: Streams) -> None:
            reader, writer = streams
            writer.write(answers[0])
            for answer in answers[1:]:
                await _read(reader)
                writer.write(answer)
            writer.close()

        async def peer(port: int) -> None:
            await connect("127.0.0.1", port, TOKEN, RUN, None)

        await serve(handler, peer)

    asyncio.run(main())


CHALLENGE = _frame(Challenge(VERSION, bytes(NONCE_BYTES)))


def test_a_coordinator_of_another_version_is_refused() -> None:
    with pytest.raises(JoinRefused, match=f"speaks version {VERSION + 1}, this peer {VERSION}: install the same"):
        answer_with(_frame(Challenge(VERSION + 1, bytes(NONCE_BYTES))))


def test_a_coordinator_without_the_token_is_refused() -> None:
    with pytest.raises(JoinRefused, match="does not hold this run's token"):
        answer_with(CHALLENGE, _frame(Granted(bytes(32))))


def test_a_refusal_is_told() -> None:
    with pytest.raises(JoinRefused, match="refused this peer: for a reason"):
        answer_with(CHALLENGE, _frame(Refused("for a reason")))


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n", _frame(Alive()), _frame(Leave("x")), b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff"],
)
def test_what_is_no_coordinator_is_a_protocol_error(answer: bytes) -> None:
    with pytest.raises(ProtocolError):
        answer_with(answer)


def test_a_coordinator_that_ends_in_the_handshake_can_be_tried_again() -> None:
    for answers in ((b"",), (CHALLENGE[:7],), (CHALLENGE, b"")):
        with pytest.raises((asyncio.IncompleteReadError, OSError)):
            answer_with(*answers)


def prove_with(answer: Callable[[Challenge], bytes]) -> bytes:
    """Answer a coordinator's challenge with these bytes; returns what it said last. Raises what it raised."""
    said = b""

    async def main() -> None:
        async def handler(streams: Streams) -> None:
            await accept(*streams, TOKEN, RUN)

        async def peer(port: int) -> None:
            nonlocal said
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            challenge = decode_from_coordinator(await _read(reader))
            assert isinstance(challenge, Challenge)
            writer.write(answer(challenge))
            writer.write_eof()
            said = await reader.read()
            writer.close()

        await serve(handler, peer)

    asyncio.run(main())
    return said


def proof(challenge: Challenge, version: int = VERSION, run: str = RUN, token: bytes = TOKEN) -> Proof:
    """What a peer answers that has the token."""
    nonce = bytes(range(NONCE_BYTES))
    return Proof(version, run, nonce, derive_key(token, "proof", run.encode(), challenge.nonce, nonce))


def test_a_peer_of_another_version_is_refused() -> None:
    with pytest.raises(ProtocolError, match=f"speaks version {VERSION + 1}, the coordinator {VERSION}"):
        prove_with(lambda challenge: _frame(proof(challenge, version=VERSION + 1)))


def test_a_recorded_proof_is_worth_nothing() -> None:
    recorded: list[bytes] = []

    def record(challenge: Challenge) -> bytes:
        recorded.append(_frame(proof(challenge)))
        return recorded[0]

    prove_with(record)
    with pytest.raises(ProtocolError, match="wrong token"):
        prove_with(lambda _: recorded[0])


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (MAX_HANDSHAKE_FRAME + 1).to_bytes(4) + b"x",
        _frame(Beat([])),
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x05hello",
        _frame(Proof(VERSION, "r" * 129, bytes(16), bytes(32))),
        _frame(Proof(VERSION, "run", bytes(15), bytes(32))),
    ],
)
def test_garbage_in_the_handshake_is_a_protocol_error(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        prove_with(lambda _: garbage)


def test_a_peer_that_ends_in_the_handshake_is_gone() -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        prove_with(lambda _: b"\x00\x00\x00\x50half a proof")


def tampered(change: Callable[[list[bytes]], list[bytes]], match: str = "checksum is wrong") -> None:
    """Send three messages whose frames somebody changes on their way; the receiver must notice."""

    async def talk(peer: Channel, coordinator: Channel) -> None:
        frames: list[bytes] = []

        class Tap:
            def write(self, data: bytes) -> None:
                frames.append(data)

        wire_end, peer.writer = peer.writer, Tap()  # type: ignore[assignment]
        for reason in ("one", "two", "three"):
            peer.send(Leave(reason))
        peer.writer = wire_end
        for frame in change(frames):
            wire_end.write(frame)
        with pytest.raises(ProtocolError, match=match):
            for _ in range(4):
                await asyncio.wait_for(coordinator.receive(), 5)

    shake(then=talk)


def test_a_changed_frame_is_noticed() -> None:
    tampered(lambda f: [f[0], f[1][:-1] + bytes([f[1][-1] ^ 1]), f[2]])
    tampered(lambda f: [f[0], f[1][:5] + bytes([f[1][5] ^ 1]) + f[1][6:], f[2]])


def test_a_repeated_a_missing_and_a_swapped_frame_are_noticed() -> None:
    tampered(lambda f: [f[0], f[0]])
    tampered(lambda f: [f[0], f[2]])
    tampered(lambda f: [f[1], f[0]])


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    tampered(lambda f: [(MAX_FRAME + 1).to_bytes(4) + bytes(16)], "over the limit")


def test_a_frame_cannot_be_sent_back_to_its_sender() -> None:
    async def talk(peer: Channel, coordinator: Channel) -> None:
        # The two directions have keys of their own.
        body = encode(Alive())
        mac = hmac.digest(coordinator._receive_key, (0).to_bytes(8) + body, "sha256")[:16]
        coordinator.writer.write(len(body).to_bytes(4) + mac + body)
        with pytest.raises(ProtocolError, match="checksum is wrong"):
            await asyncio.wait_for(peer.receive(), 5)

    shake(then=talk)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa4type\xa4Nope", encode(Alive()), bytes(range(150, 214))])
def test_a_frame_that_is_no_message_of_a_peer_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed frame from a peer"):
        decode_from_peer(data)


def test_unknown_fields_and_values_out_of_range_are_refused() -> None:
    def peer(value: dict[str, object]) -> None:
        decode_from_peer(msgspec.msgpack.encode(value))

    peer({"type": "Leave", "reason": "x"})
    bad: list[dict[str, object]] = [
        {"type": "Leave", "reason": "x", "more": 1},
        {"type": "Leave"},
        {"type": "Leave", "reason": "x" * 2001},
        {"type": "Admit", "epoch": -1},
        {"type": "Admit", "epoch": 1.5},
        {"type": "Admit", "epoch": "1"},
        {"type": "Join", "nonce": bytes(16), "host": "", "port": 1, "transport": "gloo"},
        {"type": "Join", "nonce": bytes(16), "host": "h", "port": 65536, "transport": "gloo"},
        {"type": "Report", "epoch": 1, "lanes": {"": {}}},
    ]
    for value in bad:
        with pytest.raises(ProtocolError):
            peer(value)
    with pytest.raises(ProtocolError, match="malformed frame from the coordinator"):
        decode_from_coordinator(encode(Leave("x")))


def test_the_token_comes_from_the_argument_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RINGHOLD_TOKEN", raising=False)
    monkeypatch.delenv("RINGHOLD_TOKEN_FILE", raising=False)
    with pytest.raises(UsageError, match="no token: set RINGHOLD_TOKEN"):
        load_token()
    (tmp_path / "token").write_text("from a file\n")
    monkeypatch.setenv("RINGHOLD_TOKEN_FILE", str(tmp_path / "token"))
    assert load_token() == b"from a file"
    monkeypatch.setenv("RINGHOLD_TOKEN", "from the environment")
    assert load_token() == b"from the environment"
    assert load_token("given") == b"given"
    monkeypatch.delenv("RINGHOLD_TOKEN")
    monkeypatch.setenv("RINGHOLD_TOKEN_FILE", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="cannot read the token file"):
        load_token()


def test_keys_and_nonces_are_apart() -> None:
    keys = {
        derive_key(token, purpose, *parts)
        for token in (b"a", b"b")
        for purpose in ("proof", "granted", "up", "down")
        for parts in ((b"r", b"n"), (b"rn", b""), (b"", b"rn"), (b"r\0n",))
    }
    assert len(keys) == 2 * 4 * 4
    assert public_nonce(b"s" * 16) != public_nonce(b"t" * 16)
    assert len(public_nonce(b"s" * 16)) == NONCE_BYTES


def test_unusable_tls_options_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    assert client_tls(Options()) is None
    assert server_tls(Options()) is None
    with pytest.raises(OptionError, match="tls_ca: cannot use"):
        client_tls(Options(tls_ca=missing))
    with pytest.raises(OptionError, match="tls_cert and tls_key"):
        server_tls(Options(tls_cert=missing, tls_key=missing))
