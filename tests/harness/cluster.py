"""A real coordinator and real peers for a test: processes, sockets and signals, in milliseconds.

    def sums(peer: Peer, count: int) -> float:                 # in a module of programs, not in the test's own
        with peer.join() as comm:
            return comm.all_reduce(torch.ones(count)).result.sum().item()

    def test_sums() -> None:
        with Cluster(founders=3, heartbeat=0.1) as cluster:
            assert cluster.run(sums, 3, count=5) == [15.0, 15.0, 15.0]

How a test steers its peers: a program says something (`peer.say("ready", rank=1)`) and the test waits for it
(`process.expect("ready")["rank"]`); the test tells (`process.tell("go")`) and the program waits (`peer.hear("go")`).
A program ends by returning JSON, by raising, or by a signal: `process.result()` is the value and an assertion that
nothing else happened, `process.ending()` is whatever happened. In both, a thread of the peer that ended by an
exception, or an error that was logged, fails the test.

The coordinator is `run_coordinator` on a free port with its journal in a temporary folder; `cluster.coordinator` is its
process, to be killed or stopped, and `cluster.start_coordinator()` starts it again on journal and port. `with` ends
every process that was started, stopped ones too. Peers are forked from a `Zygote` that has imported torch; there is one
for each test process, started with its first cluster. A fork and a join take about 0.1 s together.
"""

import asyncio
import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from collectives.membership.protocol import Inspect, Status, decode_from_coordinator
from collectives.membership.wire import connect
from collectives.options import Options

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
"""Seconds that anything in a test may take before the test fails: generous, for a busy machine."""
TOKEN = "harness"


class Zygote:
    """The process that peers are forked from. For any thread."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread each: a library that starts threads at import must not do so before the forks.
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.harness.zygote", str(theirs.fileno())],
            cwd=ROOT,
            env=environ,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._line = mine
        self._lock = threading.Lock()
        self._started: list[Child] = []
        self._ended: dict[int, int] = {}

    def fork(self, request: Mapping[str, Any], line: socket.socket) -> "Child":
        """Start a process. `line` becomes its own."""
        with self._lock:
            socket.send_fds(self._line, [json.dumps(request).encode()], [line.fileno()])
            deadline = time.monotonic() + PATIENCE
            while not self._started:
                assert self._read(deadline), "the zygote does not answer"
            return self._started.pop()

    def status(self, child: "Child", timeout: float) -> int:
        """Wait for the end of a process: its exit code, or the signal that ended it as a negative number."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                if child.number in self._ended:
                    return self._ended[child.number]
                self._read(min(deadline, time.monotonic() + 0.05))
            assert time.monotonic() < deadline, f"process {child.pid} did not end in {timeout} s"

    def close(self) -> None:
        """End it, and all that were forked from it."""
        self._line.close()
        self._process.wait(PATIENCE)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._line], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        data, handles, _, _ = socket.recv_fds(self._line, 1 << 16, 1)
        assert data, "the zygote is gone"
        message = json.loads(data)
        if "started" in message:
            self._started.append(Child(message["started"], message["pid"], handles[0]))
        else:
            self._ended[message["ended"]] = message["status"]
        return True


class Child(NamedTuple):
    """A process that was forked: its number (never used again, unlike process ids), its id, and a pidfd."""

    number: int
    pid: int
    handle: int


_zygote: Zygote | None = None
_zygote_lock = threading.Lock()


def zygote() -> Zygote:
    """Return this test process' zygote; it lives as long."""
    global _zygote
    with _zygote_lock:
        if _zygote is None:
            _zygote = Zygote()
            atexit.register(_zygote.close)
        return _zygote


@dataclass(frozen=True)
class Ending:
    """How a process ended: with a value, by an error (its class, its text and its plain attributes), or by a signal."""

    value: Any = None
    error: str = ""
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    signal: int = 0
    defects: tuple[str, ...] = ()


class Process:
    """A process of a cluster, seen from the test."""

    def __init__(self, name: str, child: Child, line: socket.socket, log: Path) -> None:
        self.name, self.pid, self.log = name, child.pid, log
        self._child = child
        self._line = line
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        self._eof = self._ended = False
        self.killed = False
        """Whether the test has sent it SIGKILL."""
        self._ending: Ending | None = None

    def __repr__(self) -> str:
        return f"<{self.name}, pid {self.pid}>"

    def tell(self, word: str, **data: Any) -> None:
        """Say something to the program; it gets it by `peer.hear(word)`."""
        self._line.sendall(json.dumps({"word": word, **data}).encode() + b"\n")

    def expect(self, *events: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait until the program says one of `events`; returns what came with it, the oldest first."""
        deadline = time.monotonic() + timeout
        while True:
            for one in self._events:
                if one["event"] in events:
                    self._events.remove(one)
                    return one
            assert self._read(deadline), f"{self} did not say {' or '.join(events)} in {timeout} s, {self._story()}"

    def said(self, event: str) -> bool:
        """Whether the program has said `event` (and `expect` would return at once)."""
        while not self._eof and select.select([self._line], [], [], 0)[0]:
            self._read(time.monotonic())
        return any(one["event"] == event for one in self._events)

    def ending(self, timeout: float = PATIENCE) -> Ending:
        """Wait for the end of the process, however it comes."""
        if self._ending is None:
            deadline = time.monotonic() + timeout
            while not self._eof and not any(one["event"] == "ended" for one in self._events):
                assert self._read(deadline) or self._eof, f"{self} did not end in {timeout} s, {self._story()}"
            said = next((one for one in self._events if one["event"] == "ended"), None)
            status = self.status(max(1.0, deadline - time.monotonic()))
            if said is None:
                assert status < 0, f"{self} ended with exit code {status} and no word, {self._story()}"
                self._ending = Ending(signal=-status)
            else:
                facts = {key: value for key, value in said.items() if key not in ("event", "defects")}
                self._ending = Ending(**facts, signal=max(0, -status), defects=tuple(said["defects"]))
        assert not self._ending.defects, f"{self}: {self._ending.defects[0]}"
        return self._ending

    def result(self, timeout: float = PATIENCE) -> Any:
        """Wait for the program's value; it must not end otherwise."""
        ending = self.ending(timeout)
        assert not ending.error and not ending.signal, (
            f"{self} ended by {ending.error or ending.signal}: {ending.message} {self._story()}"
        )
        return ending.value

    def status(self, timeout: float) -> int:
        """Wait for the end of the process: its exit code, or the signal that ended it as a negative number."""
        return zygote().status(self._child, timeout)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. Raises `ProcessLookupError` if the process is gone."""
        self.killed |= number == signal.SIGKILL
        signal.pidfd_send_signal(self._child.handle, number)

    def kill(self) -> None:
        """End it by SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.status(PATIENCE)

    def stop(self) -> None:
        """Stop it by SIGSTOP, and wait until it has stopped."""
        self.signal(signal.SIGSTOP)
        deadline = time.monotonic() + PATIENCE
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"{self} does not stop"
            time.sleep(0.001)

    def wake(self) -> None:
        """Let it go on after `stop`."""
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """End it if it is still there; for the cluster."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.status(PATIENCE)
        os.close(self._child.handle)
        self._line.close()

    def _read(self, deadline: float) -> bool:
        """Take in what the program says next. False: nothing until the deadline, or never again."""
        if self._eof or not select.select([self._line], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = self._line.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._eof = True
            return False
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._events += [json.loads(line) for line in lines]
        return True

    def _story(self) -> str:
        """For the message of a failed assertion: what it said and the end of its log."""
        log = self.log.read_text(errors="replace")[-4000:]
        return (
            f"having said {[{k: str(v)[:200] for k, v in one.items()} for one in self._events]}; its log ends:\n{log}"
        )


class Cluster:
    """One run: its coordinator and its peers. A context manager.

    Args:
        options: of coordinator and peers, see `collectives.options.Options`. `founders` is how many peers the first
            epoch waits for. Unless given, `heartbeat_timeout` is long, so that a busy machine gets nobody evicted: a
            death by signal is noticed at once without it.
        transport: what the peers join with; empty: RINGHOLD_TEST_TRANSPORT, else gloo.
        coordinator: False starts none.

    """

    RUN = "test"

    def __init__(self, *, transport: str = "", coordinator: bool = True, **options: Any) -> None:
        self.options = {"heartbeat_timeout": 10.0, **options}
        Options.resolve(self.options, {})
        self.transport = transport or os.environ.get("RINGHOLD_TEST_TRANSPORT", "gloo")
        self.processes: list[Process] = []
        self.port = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ringhold-test-")
        self.folder = Path(self._folder.name)
        self.journal = self.folder / "journal"
        self._coordinator: Process | None = None
        if coordinator:
            self.start_coordinator()

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator."""
        return f"127.0.0.1:{self.port}"

    @property
    def coordinator(self) -> Process:
        """The coordinator's process, the last that was started."""
        assert self._coordinator is not None, "this cluster has no coordinator"
        return self._coordinator

    def start_coordinator(self, **options: Any) -> Process:
        """Start the coordinator, again on the same journal and port if there was one; returns when it listens."""
        self._coordinator = self.peer(
            "tests.harness.coordinator:coordinate",
            journal=str(self.journal),
            port=self.port,
            new=not self.journal.exists(),
            options={**self.options, **options},
        )
        self.port = self._coordinator.expect("listening")["port"]
        return self._coordinator

    def peer(self, program: str | Callable[..., Any], /, **given: Any) -> Process:
        """Start a process that runs `program(peer, **given)`."""
        reference = program if isinstance(program, str) else f"{program.__module__}:{program.__qualname__}"
        name = f"{reference.rpartition(':')[2]}-{len(self.processes)}"
        log = self.folder / f"{name}.log"
        mine, theirs = socket.socketpair()
        setting = {
            "address": self.address,
            "run": self.RUN,
            "token": TOKEN,
            "transport": self.transport,
            "options": self.options,
        }
        request = {"program": reference, "name": name, "given": given, "setting": setting, "log": str(log)}
        child = zygote().fork(request, theirs)
        theirs.close()
        process = Process(name, child, mine, log)
        self.processes.append(process)
        return process

    def peers(self, program: str | Callable[..., Any], count: int, /, **given: Any) -> list[Process]:
        """Start several that run the same program; which of them has which rank is for the join to decide."""
        return [self.peer(program, **given) for _ in range(count)]

    def run(self, program: str | Callable[..., Any], count: int, /, **given: Any) -> list[Any]:
        """Start several and return their values when all have ended."""
        return [process.result() for process in self.peers(program, count, **given)]

    def status(self) -> Status:
        """Ask the coordinator what it knows."""

        async def ask() -> Status:
            channel = await connect("127.0.0.1", self.port, TOKEN.encode(), self.RUN, None)
            channel.send(Inspect())
            answer = decode_from_coordinator(await channel.receive())
            channel.close()
            assert isinstance(answer, Status)
            return answer

        return asyncio.run(asyncio.wait_for(ask(), PATIENCE))

    def await_status(self, fits: Callable[[Status], bool]) -> Status:
        """Ask the coordinator until `fits(status)`; returns that."""
        deadline = time.monotonic() + PATIENCE
        while not fits(status := self.status()):
            assert time.monotonic() < deadline, f"the coordinator still says {status}"
            time.sleep(0.02)
        return status

    def close(self) -> None:
        """End every process that was started here."""
        for process in self.processes:
            process.end()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
