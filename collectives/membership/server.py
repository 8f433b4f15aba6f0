"""The coordinator's process: sockets, clock and journal around the state machine of `coordinator.py`.

`ringhold coordinator` runs it; a job's supervisor starts it as a child. It carries no tensor data.
"""

import asyncio
import errno
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from collectives.errors import JournalError, ProtocolError, RingholdError, UsageError
from collectives.membership.coordinator import Action, Close, Coordinator, Persist, Send, Stop
from collectives.membership.journal import Journal
from collectives.membership.protocol import NONCE_BYTES, Decision, Evict, FromPeer, Prepared, Status, decode_from_peer
from collectives.membership.refusals import Refusals
from collectives.membership.wire import HANDSHAKE_SECONDS, Channel, accept, public_nonce, server_tls
from collectives.options import Options

log = logging.getLogger("ringhold.coordinator")

MAX_UNPROVEN = 256
"""Connections that may be in their handshake at once; when more come, the oldest goes. An honest handshake takes
milliseconds, so that idle ones, however many, keep nobody out."""
DESCRIPTORS = 65536
MAX_UNSENT = 4 << 20
"""Bytes that may wait for a peer that does not read; then its connection is closed."""


class CoordinatorServer:
    """Serves one run on one address until it is stopped.

    Args:
        host, port: where to listen; port 0 takes a free one, `port` tells which.
        journal: open journal of this run.
        run: name of the run; peers of another are refused.
        token: the shared secret.
        options: timeouts, founders, TLS.
        watcher: told several times a heartbeat what the run does; must not block.

    """

    def __init__(
        self,
        host: str,
        port: int,
        journal: Journal,
        run: str,
        token: bytes,
        options: Options,
        watcher: Callable[[Status], None] | None = None,
    ) -> None:
        self.host, self.port = host, port
        self._watcher = watcher
        self._journal = journal
        self._run, self._token = run, token
        self._options = options
        self._coordinator = Coordinator(
            run, options, journal.records, time.monotonic(), public_nonce, lambda: os.urandom(NONCE_BYTES)
        )
        self._channels: dict[int, Channel] = {}
        self._last_connection = 0
        self._unproven: dict[asyncio.StreamWriter, None] = {}
        self._refusals = Refusals()
        self._stopped = asyncio.Event()
        self._failure: RingholdError | None = None

    async def start(self) -> None:
        """Bind the socket. Raises `UsageError` if the address cannot be had."""
        tls = server_tls(self._options)
        try:
            self._server = await asyncio.start_server(
                self._serve,
                self.host,
                self.port,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if tls else None,
                backlog=512,
            )
        except OSError as error:
            why = "the port is in use" if error.errno == errno.EADDRINUSE else str(error)
            raise UsageError(f"cannot listen on {self.host}:{self.port}: {why}; choose another --listen") from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def serve(self) -> None:
        """Serve until `stop` or a failure that makes going on harmful, which is raised."""
        ticker = asyncio.create_task(self._tick())
        try:
            await self._stopped.wait()
        finally:
            ticker.cancel()
            self._server.close()
            self._refusals.close()
            for channel in list(self._channels.values()):
                channel.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `serve`."""
        self._stopped.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._options.heartbeat / 4)
            self._perform(self._coordinator.on_tick)
            if self._watcher is not None:
                self._watcher(self._coordinator.status(time.monotonic()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._converse(reader, writer)
        except asyncio.CancelledError:
            writer.close()  # the loop ends, and asyncio prints a traceback for each connection that it has to cancel

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if len(self._unproven) >= MAX_UNPROVEN:
            oldest = next(iter(self._unproven))
            del self._unproven[oldest]  # now: of those that come at once, each makes room
            oldest.transport.abort()
        self._unproven[writer] = None
        try:
            channel = await asyncio.wait_for(accept(reader, writer, self._token, self._run), HANDSHAKE_SECONDS)
        except (ProtocolError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            self._refusals.tell(peer, str(error) or "it was too slow")
            writer.close()
            return
        finally:
            self._unproven.pop(writer, None)
        self._last_connection += 1
        connection = self._last_connection
        self._channels[connection] = channel
        try:
            while True:
                self._handle(connection, decode_from_peer(await channel.receive()))
        except ProtocolError as error:
            log.warning("closed the connection from %s: %s", peer, error)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            if self._channels.pop(connection, None) is not None:
                self._perform(self._coordinator.on_closed, connection)
            channel.close()

    def _handle(self, connection: int, message: FromPeer) -> None:
        if connection in self._channels:
            self._perform(self._coordinator.on_message, connection, message)

    def _perform(self, event: Callable[..., list[Action]], *given: object) -> None:
        """Do what follows from an event, in order; a record is durable before anything behind it is sent."""
        if self._stopped.is_set():
            return
        try:
            for action in event(*given, time.monotonic()):
                self._do(action)
        except JournalError as error:
            self._fail(error)
        except Exception as error:
            # Nobody knows what state this is; the journal does. Start again from there.
            log.exception("the coordinator failed")
            self._fail(RingholdError(f"the coordinator failed: {error!r}; this is a defect, please report it"))

    def _do(self, action: Action) -> None:
        match action:
            case Persist(record):
                self._journal.append(record)
                _log_record(record)
            case Send(connection, message):
                channel = self._channels.get(connection)
                if channel is not None and not channel.writer.transport.is_closing():
                    channel.send(message)
                    if isinstance(message, Evict):
                        log.info("%s", message.reason)
                    if channel.writer.transport.get_write_buffer_size() > MAX_UNSENT:
                        channel.writer.transport.abort()
            case Close(connection):
                channel = self._channels.pop(connection, None)
                if channel is not None:
                    channel.close()
            case Stop(reason):
                raise JournalError(reason)

    def _fail(self, error: RingholdError) -> None:
        self._failure = error
        self._stopped.set()


def _take_descriptors() -> None:
    """Have as many as the system gives: strangers that say nothing hold some for as long as a handshake may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _log_record(record: object) -> None:
    match record:
        case Prepared(epoch):
            log.info("preparing epoch %d", epoch)
        case Decision():
            members = " ".join(str(info.member) for info in record.members) or "nobody"
            log.info("epoch %d: members %s; lost %s; joined %s", record.epoch, members, record.lost, record.joined)


def run_coordinator(
    host: str,
    port: int,
    journal: Path,
    *,
    run: str,
    token: bytes,
    options: Options,
    new: bool = False,
    ready: Callable[[int], None] | None = None,
    watcher: Callable[[Status], None] | None = None,
) -> None:
    """Run a coordinator in the foreground until SIGTERM or SIGINT.

    `ready` is called with the port once it listens, `watcher` as of `CoordinatorServer`.

    Raises:
        UsageError: the address cannot be had.
        JournalError: the journal cannot be used, or became too old (a member has seen a newer epoch).

    """

    async def main() -> None:
        with Journal(journal, run, new) as opened:
            server = CoordinatorServer(host, port, opened, run, token, options, watcher)
            await server.start()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop)
            log.info("coordinator of run %r listens on %s:%d, journal %s", run, host, server.port, journal)
            if ready is not None:
                ready(server.port)
            await server.serve()

    _take_descriptors()
    asyncio.run(main())
