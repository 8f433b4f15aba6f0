"""Strangers that knock at the ports of a run: for tests and for the benchmark that ask whether anybody is disturbed.

`Strangers` is a process that attacks for as long as it is open. It counts what it did, by kind of attack, and how often
it was let in, which must be never.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from collectives.errors import JoinRefused, ProtocolError
from collectives.membership.protocol import MAX_FRAME, NONCE_BYTES, VERSION, Proof, encode
from collectives.membership.wire import connect, derive_key
from collectives.transports.handshake import Handshake

IDLE = 1000
"""Connections that say nothing."""
_PAUSE = 0.02


class Strangers:
    """The process. Arguments are the coordinator's port, those at which members take links, and the run's name."""

    def __init__(self, coordinator: int, links: Sequence[int], run: str) -> None:
        self.done: dict[str, int] = {}
        self.let_in: dict[str, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.strangers", json.dumps([coordinator, list(links), run])],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def look(self) -> None:
        """Wait for its next report, which comes several times a second."""
        assert self._process.stdout is not None
        self.done, self.let_in = json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60.0)


class _Crowd:
    """The threads of that process."""

    def __init__(self, coordinator: int, links: Sequence[int], run: str) -> None:
        self.done: Counter[str] = Counter()
        self.let_in: Counter[str] = Counter()
        self._coordinator, self._links, self._run = coordinator, links, run
        self._random = random.Random(1)
        self._stop = threading.Event()
        self._idle: list[socket.socket] = []
        attacks: list[Callable[[], None]] = [self._wrong_token, self._garbage, self._oversized, self._replay]
        attacks += [self._slow, self._foreign_link]
        self._threads = [threading.Thread(target=self._repeat, args=(attack,), daemon=True) for attack in attacks]
        self._threads.append(threading.Thread(target=self._stand_around, args=(IDLE,), daemon=True))

    def attack(self) -> None:
        """Attack, and report, until the other end of stdin is closed."""
        for thread in self._threads:
            thread.start()
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            print(json.dumps([self.done, self.let_in]), flush=True)
        self._stop.set()

    def _repeat(self, attack: Callable[[], None]) -> None:
        while not self._stop.wait(_PAUSE):
            with contextlib.suppress(OSError):
                attack()
                self.done[attack.__name__] += 1

    def _wrong_token(self) -> None:
        async def knock() -> None:
            with contextlib.suppress(JoinRefused, ProtocolError, asyncio.IncompleteReadError, TimeoutError):
                handshake = connect("127.0.0.1", self._coordinator, os.urandom(8), self._run, None)
                await asyncio.wait_for(handshake, 5.0)
                self.let_in["_wrong_token"] += 1

        asyncio.run(knock())

    def _garbage(self) -> None:
        for port in (self._coordinator, *self._links):
            self._throw("_garbage", port, self._random.randbytes(self._random.randrange(1, 4000)))

    def _oversized(self) -> None:
        proof = encode(Proof(VERSION, self._run, bytes(NONCE_BYTES), bytes(32)))
        for length in (MAX_FRAME + 1, 2**32 - 1, 2**31):
            self._throw("_oversized", self._coordinator, length.to_bytes(4) + proof)

    def _replay(self) -> None:
        """Play a proof for another nonce than that of the challenge."""
        self._throw("_replay", self._coordinator, forged_proof(self._run))

    def _slow(self) -> None:
        """Say the first bytes of a proof, one at a time, until it makes room for others."""
        with socket.create_connection(("127.0.0.1", self._coordinator), 5.0) as sock, contextlib.suppress(OSError):
            for byte in forged_proof(self._run)[:20]:
                sock.sendall(bytes([byte]))
                if self._stop.wait(0.1):
                    return

    def _foreign_link(self) -> None:
        """Claim to be a member of some epoch at a link port."""
        for port in self._links:
            for epoch in range(1, 4):
                self._throw("_foreign_link", port, Handshake(b"guess", epoch, b"nonce", 1, 3, 0).opening + bytes(64))

    def _throw(self, name: str, port: int, data: bytes) -> None:
        """Send these bytes; whoever answers with more than a challenge and a refusal has let us in."""
        with socket.create_connection(("127.0.0.1", port), 5.0) as sock:
            sock.settimeout(0.5)
            with contextlib.suppress(OSError):
                sock.sendall(data)
            received = b""
            with contextlib.suppress(OSError):
                while piece := sock.recv(4096):
                    received += piece
            self.let_in[name] += b"Granted" in received

    def _stand_around(self, count: int) -> None:
        """Keep so many idle connections open; those that are closed on us are made again."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 500
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
        while not self._stop.is_set():
            while len(self._idle) < count and not self._stop.is_set():
                try:
                    self._idle.append(socket.create_connection(("127.0.0.1", self._coordinator), 5.0))
                except OSError:
                    break
                self.done["_stand_around"] += 1
            time.sleep(0.1)
            self._idle = [sock for sock in self._idle if _is_open(sock)]


def forged_proof(run: str) -> bytes:
    """A frame of the handshake whose proof was made with a guessed token."""
    nonce = bytes(NONCE_BYTES)
    body = encode(Proof(VERSION, run, nonce, derive_key(b"guess", "proof", run.encode(), nonce, nonce)))
    return len(body).to_bytes(4) + body


def _is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    sock.close()
    return False


if __name__ == "__main__":
    _Crowd(*json.loads(sys.argv[1])).attack()
