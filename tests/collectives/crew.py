"""A crew of real processes for transport and engine tests, fed with jobs by the test process.

As a module: `Crew`, used by tests. As a script: the processes themselves, forked off one that has imported torch,
because that import takes longer than most tests.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

KEY = b"k" * 32
PATIENCE = 30.0


@dataclass
class Reply:
    """What a job returned, or the error that it raised, and how long it took."""

    value: Any = None
    error: str = ""
    peer: int | None = None
    message: str = ""
    seconds: float = 0.0


class Crew:
    """`size` processes; `addresses` are those of their link listeners."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = f"{self._folder.name}/crew"
        with Listener(path, "AF_UNIX", backlog=size) as listener:
            self._process = subprocess.Popen([sys.executable, str(Path(__file__)), path, str(size)])
            joined = sorted((conn.recv(), conn) for conn in (listener.accept() for _ in range(size)))
        self.pids = [hello[1] for hello, _ in joined]
        self.addresses = [hello[2] for hello, _ in joined]
        self._connections: list[Connection] = [conn for _, conn in joined]
        self.epoch = 0

    def start(self, who: int, job: str, /, **given: Any) -> None:
        """Start a job in one process; fetch its reply with `reply`, or it is a `!job` that has none."""
        self._connections[who].send((job, given))

    def reply(self, rank: int, timeout: float = PATIENCE) -> Reply:
        """The reply to the job that was started last."""
        assert self._connections[rank].poll(timeout), f"rank {rank} did not reply in {timeout} s"
        return Reply(**self._connections[rank].recv())

    def run(self, job: str, world: int, /, **given: Any) -> list[Any]:
        """Run a job in the first `world` processes and return what they return."""
        for rank in range(world):
            self.start(rank, job, **given)
        replies = [self.reply(rank) for rank in range(world)]
        for reply in replies:
            assert not reply.error, f"{reply.error}: {reply.message}"
        return [reply.value for reply in replies]

    def connect(self, world: int) -> None:
        """Give the first `world` processes a transport of a new epoch."""
        self.epoch += 1
        for rank in range(world):
            self.start(rank, "connect", rank=rank, addresses=self.addresses[:world], epoch=self.epoch)
        for rank in range(world):
            reply = self.reply(rank)
            assert not reply.error, reply.message

    def kill(self, rank: int, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of the processes."""
        os.kill(self.pids[rank], signum)

    def close(self) -> None:
        """End all processes."""
        for pid, connection in zip(self.pids, self._connections, strict=True):
            connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        self._folder.cleanup()


@contextlib.contextmanager
def crew_of(size: int) -> Iterator[Crew]:
    """A crew for the length of a with statement."""
    crew = Crew(size)
    try:
        yield crew
    finally:
        crew.close()


@dataclass
class _Hand:
    """One process: takes jobs, one at a time in a thread of its own; jobs named `!...` are done at once."""

    connection: Connection
    listener: Any
    transport: Any = None
    pool: Any = None
    engine: Any = None
    threads: list[threading.Thread] = field(default_factory=list)

    def serve(self) -> None:
        while True:
            try:
                job, given = self.connection.recv()
            except EOFError:
                os._exit(0)
            method = getattr(self, "do_" + job.removeprefix("!"))
            if job.startswith("!"):
                method(**given)
            else:
                threading.Thread(target=self._work, args=(method, given), daemon=True).start()

    def _work(self, method: Callable[..., Any], given: dict[str, Any]) -> None:
        from collectives.errors import RingholdError

        begun = time.perf_counter()
        reply = Reply()
        try:
            reply.value = method(**given)
        except (RingholdError, AssertionError, RuntimeError, ValueError) as error:
            reply.error, reply.message = type(error).__name__, str(error)
            reply.peer = getattr(error, "peer", None)
        reply.seconds = time.perf_counter() - begun
        self.connection.send(vars(reply))  # plain: this module has another name in the tests

    def do_connect(self, rank: int, addresses: list[tuple[str, int]], epoch: int, timeout: float = 20.0) -> None:
        from collectives.transports.gloo import GlooTransport

        if self.transport is not None:
            self.transport.close()
        self.transport = GlooTransport(self.listener, rank, addresses, KEY, epoch, b"nonce")
        self.transport.connect(timeout)

    def do_abort(self) -> None:
        self.transport.abort()

    def do_close(self) -> None:
        self.transport.close()

    def do_receive(self, peer: int, count: int) -> list[float]:
        import torch

        into = torch.zeros(count)
        self.transport.recv(peer, into, 1).wait()
        return into.tolist()  # type: ignore[no-any-return]

    def do_send(self, peer: int, values: list[float]) -> None:
        import torch

        self.transport.send(peer, torch.tensor(values), 1).wait()

    def do_note(self, peer: int, timeout: float | None = None) -> bytes:
        return self.transport.recv_note(peer, 1, timeout)  # type: ignore[no-any-return]

    def do_send_note(self, peer: int, note: bytes) -> None:
        self.transport.send_note(peer, note, 1)

    def do_usage(self) -> tuple[int, int]:
        """How many threads and descriptors this process has."""
        return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))

    def do_rebuild(self, times: int, rank: int, addresses: list[tuple[str, int]], epoch: int, size: int) -> None:
        """Build and close transports; every other one after an exchange, every third with a receive in flight."""
        import torch

        from collectives.errors import TransportLost

        world = len(addresses)
        for number in range(times):
            self.do_connect(rank, addresses, epoch + number)
            if number % 2:
                data, into = torch.full((size,), float(rank)), torch.empty(size)
                receive = self.transport.recv((rank - 1) % world, into, 2)
                self.transport.send((rank + 1) % world, data, 2).wait()
                receive.wait()
                assert into.eq((rank - 1) % world).all()
            if number % 3 == 0:
                receive = self.transport.recv((rank + 1) % world, torch.empty(size), 3)
                self.transport.abort()
                try:
                    receive.wait()
                except TransportLost:
                    continue
                raise AssertionError("an aborted receive returned")
        self.transport.close()

    def do_collective(self, case: dict[str, Any]) -> tuple[list[Any], list[str]]:
        """Run a schedule; the values of the result where wanted, and the probe points that were passed."""
        import torch

        from collectives.engine import Engine
        from collectives.reduction import ReduceOp
        from collectives.staging import StagingPool

        module = importlib.import_module(f"collectives.algorithms.{case['algorithm']}")
        rank, world, count = self.transport.rank, self.transport.size, case["count"]
        schedule = getattr(module, case["kind"])(world, count, **case.get("arguments", {}))
        dtype = getattr(torch, case["dtype"])
        wide = torch.float32 if case["kind"] in ("all_reduce", "reduce_scatter") and dtype.itemsize == 2 else dtype
        if self.pool is None:
            self.pool = StagingPool()
        engine = Engine(self.pool, case.get("segment", 2**20), case.get("window", 4))
        whole = values_of(rank, count, dtype)
        source = torch.cat([whole[start:stop] for start, stop in schedule.held(rank)] or [whole[:0]])
        before = source.clone()
        staging = self.pool.take(count, wide)
        staging.fill_(77)
        points: list[str] = []
        kernels = {"finish": lambda piece: piece.mul_(3)}
        for channel in case.get("channels", (5,)):
            engine.run(
                schedule,
                self.transport,
                channel,
                source,
                staging,
                ReduceOp(case.get("op", "sum")),
                kernels,
                points.append,
                case.get("lift", True),
            )
        assert torch.equal(source, before), "the caller's tensor was written"
        result = [staging[start:stop].to(torch.float64) for start, stop in schedule.wanted(rank)]
        return torch.cat(result or [staging[:0]]).tolist(), points


def values_of(rank: int, count: int, dtype: Any) -> Any:
    """What a rank contributes: small whole numbers, so that every dtype adds them exactly."""
    import torch

    return ((torch.arange(count) * 7 + rank * 3) % 5 + rank % 2).to(dtype)


def _main(path: str, size: int) -> None:
    import torch

    import collectives.engine  # noqa: F401 - here and not in every child
    from collectives.transports.mesh import LinkListener

    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            connection = Client(path, "AF_UNIX")
            listener = LinkListener()
            connection.send((rank, os.getpid(), listener.address))
            _Hand(connection, listener).serve()
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
