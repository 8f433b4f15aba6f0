"""A coordinator and peers as processes of their own, for the churn lab and for benchmarks: they are killed and stopped.

The main process imports torch once and forks; a peer is there within tens of milliseconds. Peers report small messages
on a pipe (`Desk.report`), and share a few words with the main process, which can be read when they are dead. Peers that
are ranks of an MPI job are in `crew_ranks`.
"""

import contextlib
import ctypes
import faulthandler
import json
import logging
import mmap
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from collectives.communicator import Communicator
from collectives.errors import RingholdError
from collectives.membership.server import run_coordinator
from collectives.options import Options
from launch.attach import status
from launch.child import die_with_parent
from launch.network import Network

Message = dict[str, Any]

WORDS = 16
"""64-bit words that a peer shares with the main process."""
_MAX_PEERS = 1 << 14
_LONGEST = 4000
"""Bytes of a message: pipes take so many at once, so a process that is stopped or killed leaves no half of one."""
_fork = multiprocessing.get_context("fork")


class Desk:
    """What a peer has at hand: where to join, where to report, and the words that it shares with the main process."""

    def __init__(
        self, name: int, address: str, run: str, token: str, options: Options, words: memoryview, pipe: Connection
    ) -> None:
        self.name = name
        self.words = words
        self._address, self._run, self._token = address, run, token
        self.options = options
        self._pipe = pipe
        self._lock = threading.Lock()

    def join(self, on_event: Callable[[Message], None] = lambda event: None, transport: str = "gloo") -> Communicator:
        """Join the run; what happens to the membership is reported as "event" messages, and passed to `on_event`."""

        def tell(event: Message) -> None:
            self.report("event", **event)
            on_event(event)

        return Communicator.join(self._address, self._run, self._token, transport, self.options, on_event=tell)

    def report(self, kind: str, **fields: Any) -> None:
        """Send a message to the main process; from any thread."""
        data = json.dumps({"type": kind, "time": time.time(), **fields}).encode()
        assert len(data) <= _LONGEST
        with self._lock:
            self._pipe.send_bytes(data)


class Peer:
    """A process of the crew, as the main process sees it; `process` and `pipe` are None before it is forked."""

    def __init__(self, name: int, words: memoryview, log: Path) -> None:
        self.name = name
        self.host = -1
        self.words = words
        self.log = log
        self.process: Any = None
        self.pipe: Connection | None = None
        self.stopped = False

    @property
    def pid(self) -> int:
        """Its process id, 0 before it is forked."""
        return self.process.pid if self.process is not None else 0

    @property
    def alive(self) -> bool:
        """Whether the process has not ended (a stopped one has not)."""
        return self.process is not None and bool(self.process.is_alive())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended, whose id is not free before we ask for its end."""
        if self.alive:
            os.kill(self.process.pid, number)
            if number in (signal.SIGSTOP, signal.SIGCONT):
                self.stopped = number == signal.SIGSTOP

    def end(self) -> int:
        """Kill it if it is there, and wait for its end; return the exit code, -N for signal N."""
        if self.alive:
            self.process.kill()
        return self.ended()

    def ended(self) -> int:
        """Wait for its end, and return the exit code."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self.process is None:
            return 0
        self.process.join()
        return int(self.process.exitcode)


class Crew:
    """One run with a coordinator of its own. A context manager that ends every process it started.

    Args:
        options: of the coordinator and of all members.
        network: peers run on its hosts, each on the one with the fewest, and listen on their host's address; the
            coordinator is on the hub.
        folder: where logs and the journal go; None: a temporary one.

    Make it in the main thread of a process that has no other: it forks.

    """

    join_seconds = 0.15
    """In which a peer is about to have joined, on an idle machine."""

    def __init__(self, options: Mapping[str, Any], network: Network | None = None, folder: Path | None = None) -> None:
        self._options = Options.resolve(options)
        self._network = network
        self._run, self._token = f"bench-{secrets.token_hex(4)}", secrets.token_hex(16)
        self._memory = mmap.mmap(-1, _MAX_PEERS * WORDS * 8)
        self._all_words = memoryview(self._memory).cast("q")
        self._folder = None if folder is not None else tempfile.TemporaryDirectory(prefix="ringhold-crew-")
        self.folder = folder or Path(self._folder.name if self._folder is not None else "")
        self.peers: list[Peer] = []
        """All that were ever started, by name."""
        self.living: dict[int, Peer] = {}
        """Those whose end has not been received yet, by name."""
        self._address = ""
        self._port = 0
        self.start_coordinator()

    @property
    def place(self) -> tuple[str, str, str]:
        """The first arguments of `Communicator.join`: coordinator, run, token."""
        return self._address, self._run, self._token

    def start_peer(self, work: Callable[[Desk], None]) -> Peer:
        """Fork a peer that runs `work` and ends. An exception in it is reported as a "failed" message.

        SIGUSR1 makes it write the stacks of its threads to its log.
        """
        peer = self._enlist()
        self._fork(peer, work)
        return peer

    def tend(self, members: Sequence[Peer]) -> None:
        """Do what is due now and then; `members` work. Here nothing is: peers are forked at once."""

    def spares(self, peer: Peer) -> bool:
        """Whether this member must not be struck now; here everybody may be."""
        return False

    def signal_coordinator(self, number: signal.Signals) -> None:
        """Send the coordinator a signal."""
        if self.coordinator.is_alive():
            assert self.coordinator.pid is not None
            os.kill(self.coordinator.pid, number)

    def receive(self, timeout: float) -> list[tuple[Peer, Message]]:
        """Wait up to `timeout` seconds for messages and return those that are there; the last of a peer is "gone"."""
        open_pipes: dict[Any, Peer] = {peer.pipe: peer for peer in self.living.values() if peer.pipe is not None}
        messages = []
        for pipe in wait(list(open_pipes), timeout):
            peer = open_pipes[pipe]
            assert peer.pipe is not None
            try:
                while peer.pipe.poll():
                    messages.append((peer, json.loads(peer.pipe.recv_bytes())))
            except (EOFError, OSError):
                del self.living[peer.name]
                messages.append((peer, {"type": "gone", "time": time.time(), "code": peer.ended()}))
        return messages

    def status(self) -> str:
        """What the coordinator knows of the members and their lanes, for people."""
        host, port = self._address.split(":")
        try:
            report = status(host, int(port), self._token.encode(), self._run, self._options)
        except RingholdError as error:
            return str(error)
        head = f"epoch {report.epoch}, change {report.change}, {report.waiting} waiting"
        return "\n".join([head, *map(str, report.members)])

    def close(self) -> None:
        """End everything that is still there."""
        for peer in self.living.values():
            peer.end()
        self.coordinator.kill()
        self.coordinator.join()
        for peer in self.peers:
            peer.words.release()
        self._all_words.release()
        self._memory.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start_coordinator(self) -> None:
        """Start the coordinator; again, on the same journal and port, where the last one has ended.

        Raises:
            RingholdError: it does not listen within ten seconds.

        """
        receive, send = _fork.Pipe(duplex=False)
        self.coordinator = _fork.Process(target=self._coordinate, args=(send, os.getpid()), name="coordinator")
        self.coordinator.start()
        send.close()
        if not receive.poll(10.0):
            self.coordinator.kill()
            raise RingholdError("the coordinator did not start within 10 s")
        self._port = int(receive.recv_bytes())
        receive.close()
        self._address = f"{self._listen}:{self._port}"

    def _enlist(self) -> Peer:
        """The next peer, of which there is nothing yet but its place here."""
        name = len(self.peers)
        words = self._all_words[name * WORDS : (name + 1) * WORDS]
        peer = Peer(name, words, self.folder / f"peer-{name:03d}.log")
        self.peers.append(peer)
        self.living[name] = peer
        return peer

    def _fork(self, peer: Peer, work: Callable[[Desk], None]) -> None:
        """Start the process of a peer."""
        receive, send = _fork.Pipe(duplex=False)
        options, enter = self._options, None
        if self._network is not None:
            taken = [other.host for other in self.living.values() if other is not peer]
            peer.host = min(range(self._network.size), key=taken.count)
            options = replace(options, listen=self._network.address(peer.host))
            enter = partial(self._network.enter, peer.host)
        desk = Desk(peer.name, *self.place, options, peer.words, send)
        peer.process = _fork.Process(
            target=_run_peer, args=(desk, work, peer.log, os.getpid(), enter), name=f"peer {peer.name}"
        )
        peer.process.start()
        send.close()
        peer.pipe = receive

    @property
    def _listen(self) -> str:
        return "127.0.0.1" if self._network is None else self._network.hub_address

    def _coordinate(self, ready: Connection, parent: int) -> None:
        _enter(self.folder / "coordinator.log", parent)
        if self._network is not None:
            self._network.enter(None)
        run_coordinator(
            self._listen,
            self._port,
            self.folder / "journal",
            run=self._run,
            token=self._token.encode(),
            options=self._options,
            new=not self._port,
            ready=lambda port: ready.send_bytes(str(port).encode()),
        )


def _enter(log: Path, parent: int) -> None:
    """First thing in a child: end with the parent, leave Ctrl-C to it, write to a log."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s: %(message)s", datefmt="%T")


def _run_peer(
    desk: Desk, work: Callable[[Desk], None], log: Path, parent: int, enter: Callable[[], None] | None
) -> None:
    _enter(log, parent)
    if enter is not None:
        enter()
    torch.set_num_threads(1)
    with log.open("a") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            work(desk)
        except Exception as error:
            traceback.print_exc()
            desk.report("failed", error=type(error).__name__, message=str(error)[:2000])
        faulthandler.unregister(signal.SIGUSR1)


def usage() -> dict[str, int]:
    """What this process holds: threads of Python, threads in all, descriptors, resident memory in bytes.

    Memory that was freed is given back to the system first, so that it does not look like a leak.
    """
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return {
        "python_threads": threading.active_count(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE,
    }
