"""Real coordinators and real sessions for the server's tests: sockets on loopback, threads, processes to be killed."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from collectives.membership.journal import Journal
from collectives.membership.protocol import (
    Decision,
    FromCoordinator,
    FromPeer,
    Inspect,
    Join,
    Status,
    Welcome,
    decode_from_coordinator,
)
from collectives.membership.server import CoordinatorServer
from collectives.membership.session import Session
from collectives.membership.wire import Channel, connect, public_nonce
from collectives.options import Options

TOKEN = b"token of the office"
RUN = "office"
PATIENCE = 20.0
"""Seconds that anything may take before a test fails: generous, for a busy machine."""


def options(**given: Any) -> Options:
    """Options of a test: quick heartbeats, patience with a busy machine."""
    return Options(**{"heartbeat": 0.05, "heartbeat_timeout": 5.0, "founders": 2, **given})


def until(condition: Callable[[], object], what: str = "that") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about in {PATIENCE} s"
        time.sleep(0.005)


class Office:
    """A coordinator in a thread of this process; a context manager that ends it."""

    def __init__(self, journal: Path, given: Options, *, new: bool = True, port: int = 0) -> None:
        self.failure: BaseException | None = None
        self.port = 0
        self.server: CoordinatorServer | None = None
        self._path, self._options, self._new, self._asked = journal, given, new, port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        until(lambda: self.port or self.failure, "the coordinator")

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.failure = error

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        with Journal(self._path, RUN, self._new) as journal:
            server = self.server = CoordinatorServer("127.0.0.1", self._asked, journal, RUN, TOKEN, self._options)
            await server.start()
            self.port = server.port
            await server.serve()

    def stop(self) -> None:
        """End it in order."""
        if self._thread.is_alive() and self._loop is not None and self.server is not None:
            self._loop.call_soon_threadsafe(self.server.stop)
        self.join()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


SCRIPT = """
import json, sys
from pathlib import Path
from collectives.errors import RingholdError
from collectives.membership.server import run_coordinator
from collectives.options import Options

port, journal, new, run, token, given = json.loads(sys.argv[1])
try:
    run_coordinator("127.0.0.1", port, Path(journal), run=run, token=token.encode(), options=Options(**given),
                    new=new, ready=lambda port: print(port, flush=True))
except RingholdError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class CoordinatorProcess:
    """A coordinator in a process of its own."""

    def __init__(self, journal: Path, given: Options, *, new: bool = True, port: int = 0) -> None:
        argument = json.dumps([port, str(journal), new, RUN, TOKEN.decode(), asdict(given)])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, argument],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line) if line else 0
        """0: it did not come to listen."""

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def ending(self) -> str:
        """Wait for its end; what it said last."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()


class Peer:
    """A session and what it told; a context manager that closes it without notice."""

    def __init__(
        self, port: int, given: Options, *, run: str = RUN, token: bytes = TOKEN, transport: str = "gloo"
    ) -> None:
        self.decisions: list[Decision] = []
        self.events: list[dict[str, Any]] = []
        self.fences = 0
        self.session = Session(
            ("127.0.0.1", port),
            run,
            token,
            given,
            transport,
            ("127.0.0.1", 1),
            on_fence=self._fenced,
            on_decision=self.decisions.append,
            on_event=self.events.append,
        )
        self.session.start()

    def _fenced(self) -> None:
        self.fences += 1

    @property
    def member(self) -> int:
        """Its id."""
        return self.session.core.member

    @property
    def epoch(self) -> int:
        """The epoch that it has applied."""
        return self.session.core.epoch

    @property
    def members(self) -> tuple[int, ...]:
        """Who is in it."""
        return self.session.core.members

    @property
    def error(self) -> Exception | None:
        """Why it is out."""
        return self.session.core.error

    def tell(self, act: Callable[[], list[FromPeer]]) -> None:
        """Do something to the state machine and post what it says."""
        with self.session.changed:
            messages = act()
        self.session.post(messages)

    def leave(self) -> None:
        """Leave with notice."""
        self.tell(lambda: self.session.core.leave("the end"))
        until(lambda: self.error, "the goodbye")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.close()


def status(port: int) -> Status:
    """Ask a coordinator what it knows."""
    with Stranger(port) as asks:
        told = asks.ask(Inspect())
    assert isinstance(told, Status)
    return told


def await_members(port: int, count: int) -> None:
    """Wait until so many members are connected, as after a restart."""
    until(lambda: [row.state for row in status(port).members] == ["member"] * count, "that all are back")


def await_epoch(epoch: int, *peers: Peer) -> None:
    """Wait until all have applied an epoch."""
    until(lambda: all(peer.epoch == epoch for peer in peers), f"epoch {epoch}")


class Stranger:
    """A peer by hand: it is let in, and then says just what the test says."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self.secret = os.urandom(16)
        self.channel: Channel = self._run(connect("127.0.0.1", port, TOKEN, RUN, None))

    def _run(self, what: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(what, PATIENCE))

    def join(self) -> int:
        """Join; returns the id."""
        welcome = self.ask(Join(public_nonce(self.secret), "127.0.0.1", 1, "gloo"))
        assert isinstance(welcome, Welcome)
        return welcome.member

    def ask(self, message: FromPeer) -> FromCoordinator:
        """Send a message and return the next one that arrives."""
        self.channel.send(message)
        return self.hear()

    def hear(self) -> FromCoordinator:
        """Return the next message."""
        return decode_from_coordinator(self._run(self.channel.receive()))

    def throw(self, data: bytes) -> None:
        """Send raw bytes."""
        self.channel.writer.write(data)
        self.drain()

    def drain(self) -> None:
        """Wait until what was sent is under way. Raises OSError if the other end has closed."""
        self._run(self.channel.writer.drain())

    def ended(self) -> bool:
        """Read to the end of the connection."""
        try:
            while True:
                self.hear()
        except (asyncio.IncompleteReadError, OSError):
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        self._run(asyncio.sleep(0))
        self._loop.close()
