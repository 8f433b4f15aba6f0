"""A member's connection to the coordinator: one thread with an event loop around the state machine of `member.py`.

The communicator's operations run in the caller's threads and share the state machine with this thread under one lock,
the engine lock (`Session.changed`, a condition that is notified whenever a verdict may have changed).
"""

import asyncio
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from collectives.errors import (
    CoordinatorUnreachable,
    Evicted,
    JoinRefused,
    OperationTimeout,
    ProtocolError,
    RingholdError,
)
from collectives.membership.member import Member
from collectives.membership.protocol import (
    NONCE_BYTES,
    Alive,
    Beat,
    Decision,
    Evict,
    FromCoordinator,
    FromPeer,
    Join,
    LaneStatus,
    Prepare,
    Refused,
    Resume,
    Waiting,
    Welcome,
    decode_from_coordinator,
)
from collectives.membership.wire import HANDSHAKE_SECONDS, Channel, client_tls, connect, public_nonce
from collectives.options import Options

log = logging.getLogger("ringhold.member")

Event = dict[str, Any]


class Session:
    """Keeps one member's place in the run.

    Args:
        address: host and port of the coordinator.
        run, token: which run, and the secret that lets one in.
        options: timeouts and TLS.
        transport: name of the transport, the same for the whole run.
        listening: host and port where this member's links listen.
        on_fence: called with no lock held when nothing of the current epoch may go on; must not block.
        on_decision: called with the new epoch; must not block.
        on_event: receives what an observer may want to know, as small dicts.

    """

    def __init__(
        self,
        address: tuple[str, int],
        run: str,
        token: bytes,
        options: Options,
        transport: str,
        listening: tuple[str, int],
        *,
        on_fence: Callable[[], None],
        on_decision: Callable[[Decision], None],
        on_event: Callable[[Event], None],
    ) -> None:
        self.changed = threading.Condition()
        self.core = Member()
        self.waiting = 0
        self.where = f"{address[0]}:{address[1]}"
        self._address, self._run, self._token = address, run, token
        self._options, self._transport, self._listening = options, transport, listening
        self._on_fence, self._on_decision, self._on_event = on_fence, on_decision, on_event
        self._tls: ssl.SSLContext | None = client_tls(options)
        self._secret = os.urandom(NONCE_BYTES)
        self._channel: Channel | None = None
        self._since: dict[tuple[int, str, int], float] = {}
        self._silent = 0
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="ringhold-session", daemon=True)

    def start(self) -> None:
        """Begin to join."""
        self._thread.start()

    def post(self, messages: list[FromPeer]) -> None:
        """Send to the coordinator from any thread; what cannot be sent now is outstanding and goes out on resuming."""
        loop = self._loop
        if messages and loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(self._send, messages)
            except RuntimeError:
                log.debug("the session ended before %d messages were sent", len(messages))

    def close(self, timeout: float = 2.0) -> None:
        """End the thread; a second call does nothing."""
        self._closed = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                log.debug("the session's loop ended by itself")
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def await_first_epoch(self, timeout: float, built: Callable[[int], bool]) -> None:
        """Return as a member of an epoch whose transport is `built`.

        Raises:
            CoordinatorUnreachable: there is none, or no epoch took us in, within `timeout` seconds.
            OperationTimeout: the transport of the epoch did not come about within that time.
            RingholdError: what ends the membership.

        """
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                core = self.core  # another one if the epoch that we were to be in died with its coordinator
                if core.error is not None:
                    raise core.error
                if core.epoch and built(core.epoch):
                    return
                left = deadline - time.monotonic()
                if left <= 0 and not core.member:
                    raise CoordinatorUnreachable(f"no coordinator at {self.where} within {timeout:g} s; is it running?")
                if left <= 0 and not core.epoch:
                    raise CoordinatorUnreachable(
                        f"no epoch took this peer in within {timeout:g} s: the members call admit() at safe points, "
                        "and the first epoch waits for all founders"
                    )
                if left <= 0:
                    raise OperationTimeout(f"the links of epoch {core.epoch} were not ready within {timeout:g} s")
                self.changed.wait(left)

    def await_admission(self) -> None:
        """Stand at a safe point until the coordinator let in who waits (rule R13). Raises what ends the membership."""
        core = self.core
        with self.changed:
            if core.error is None:
                self.post(core.admit())
            self.changed.wait_for(lambda: not core.admitting or core.error is not None)
            if core.error is not None:
                raise core.error

    def depart(self, reason: str) -> None:
        """Be no member any more, at once, and give the coordinator notice (rule R4); harmless if that is so already."""
        with self.changed:
            if self.core.error is not None:
                return
            self.post(self.core.leave(reason))
        self.fail(Evicted(f"this member departed by itself: {reason}; join again"))

    def fail(self, error: RingholdError) -> None:
        """Be no member any more, at once; every operation of this member ends with the error."""
        self._on_fence()  # first: a caller that gets the error may change memory that peers are reading (rule R10)
        with self.changed:
            self.core.fail(error)
            self.changed.notify_all()

    # --- the thread ---

    def _main(self) -> None:
        try:
            asyncio.run(self._keep())
        except Exception as error:
            # A defect in this thread must not leave the operations waiting for ever.
            log.exception("the session thread failed")
            self.fail(RingholdError(f"the session thread failed: {error!r}; this is a defect, please report it"))

    async def _keep(self) -> None:
        """Connect, serve the connection, connect again, until closed or departed."""
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        pause, needed = 0.02, 0.0
        while not self._closed and self.core.error is None:
            try:
                handshake = connect(*self._address, self._token, self._run, self._tls)
                self._channel = await asyncio.wait_for(
                    handshake, min(HANDSHAKE_SECONDS, self._options.heartbeat_timeout)
                )
                pause, needed = 0.02, 0.0
                await self._serve(self._channel)
            except JoinRefused as error:
                self.fail(error)
            except (OSError, TimeoutError, ProtocolError, asyncio.IncompleteReadError) as error:
                log.debug("no connection to the coordinator: %r", error)
            finally:
                self._drop()
            needed = (needed or time.monotonic()) if self._needs_coordinator() else 0.0
            self._give_up_if_late(needed)
            if not self._closed and self.core.error is None:
                await self._sleep(pause)
                pause = min(2 * pause, 0.5)

    def _needs_coordinator(self) -> bool:
        self._stalled(self._statuses())
        with self.changed:
            return self.core.needs_coordinator

    def _give_up_if_late(self, needed: float) -> None:
        seconds = self._options.coordinator_timeout
        if needed and time.monotonic() - needed > seconds:
            self.fail(
                CoordinatorUnreachable(
                    f"the membership must change and the coordinator at {self.where} was away for {seconds:g} s; "
                    "restart it on its journal, then join again"
                )
            )

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    async def _serve(self, channel: Channel) -> None:
        """Serve one connection until it ends."""
        with self.changed:
            core = self.core
            if core.promised:
                channel.send(Resume(core.member, self._secret, core.epoch, core.promised))
                for message in core.outstanding.values():
                    channel.send(message)
            else:
                channel.send(Join(public_nonce(self._secret), *self._listening, self._transport))
        tasks = [asyncio.create_task(t) for t in (self._receive(channel), self._beat(channel), self._wake.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _beat(self, channel: Channel) -> None:
        """Send heartbeats until the coordinator is silent for too long.

        Its silence is counted in beats of ours: time in which this process did not run is not held against it. Closing
        the connection for that would be taken for our death.
        """
        self._silent = 0
        while self._silent * self._options.heartbeat <= self._options.heartbeat_timeout:
            statuses = self._statuses()
            channel.send(Beat(statuses))
            self._send(self._stalled(statuses))
            self._silent += 1
            await asyncio.sleep(self._options.heartbeat)
        raise TimeoutError(f"the coordinator was silent for {self._options.heartbeat_timeout:g} s")

    def _statuses(self) -> list[LaneStatus]:
        """What the lanes are doing, and for how long in this epoch."""
        now = time.monotonic()
        with self.changed:
            rows, epoch = self.core.statuses(), self.core.epoch
        self._since = {key: self._since.get(key, now) for key in ((epoch, row.lane, row.seq) for row in rows)}
        return [msgspec.structs.replace(row, seconds=now - self._since[epoch, row.lane, row.seq]) for row in rows]

    def _stalled(self, statuses: list[LaneStatus]) -> list[FromPeer]:
        """Rule R11: complain, once in an epoch, of each operation that is under way for too long."""
        messages: list[FromPeer] = []
        with self.changed:
            for row in statuses:
                if row.phase != "idle" and row.seconds > self._options.op_timeout:
                    messages += self.core.stalled(row.lane, row.seq)
        return messages

    async def _receive(self, channel: Channel) -> None:
        """Handle messages until the connection ends."""
        while True:
            data = await channel.receive()
            self._silent = 0
            if self._handle(decode_from_coordinator(data)):
                return

    def _send(self, messages: list[FromPeer]) -> None:
        if self._channel is not None:
            for message in messages:
                self._channel.send(message)

    def _handle(self, message: FromCoordinator) -> bool:
        """Act on one message. True: this connection has served its purpose."""
        match message:
            case Prepare():
                self._prepare(message)
            case Decision():
                self._decide(message)
            case Waiting(count):
                self.waiting = count
            case Welcome(member):
                self.core.member = member
            case Evict():
                return self._evicted(message)
            case Refused(reason):
                raise JoinRefused(f"the coordinator refused this peer: {reason}")
            case Alive():
                pass
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__} from the coordinator")
        return False

    def _prepare(self, message: Prepare) -> None:
        with self.changed:
            report = self.core.on_prepare(message)
            self.changed.notify_all()
        if report:
            self._on_fence()
            self._send(report)
            self._on_event({"event": "fenced", "time": time.time(), "epoch": message.epoch})

    def _decide(self, decision: Decision) -> None:
        with self.changed:
            if not self.core.on_decision(decision):
                return
            self.waiting = 0
            again = list(self.core.outstanding.values())
            self.changed.notify_all()
        self._on_decision(decision)
        self._send(again)
        self._on_event(
            {
                "event": "epoch",
                "time": time.time(),
                "epoch": decision.epoch,
                "members": [info.member for info in decision.members],
                "lost": decision.lost,
                "joined": decision.joined,
            }
        )

    def _evicted(self, message: Evict) -> bool:
        if self.core.epoch == 0 and message.kind == "evicted":
            # The epoch that we were to be in died with a coordinator: ask for a place again.
            with self.changed:
                self.core = Member()
            return True
        self._on_fence()  # first, as in `fail`
        with self.changed:
            self.core.on_evict(message)
            self.changed.notify_all()
        self._on_event({"event": message.kind, "time": time.time(), "reason": message.reason})
        return True
