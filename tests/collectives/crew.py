"""A crew of real processes for transport and engine tests, fed with jobs by the test process.

As a module: `Crew`, used by tests. As a script: the processes themselves, forked off one that has imported torch,
because that import takes longer than most tests.
"""

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

KEY = b"k" * 32
PATIENCE = 30.0
KINDS = {"gloo": "GlooTransport", "sockets": "SocketTransport", "shm": "ShmTransport"}


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
        """Start a job in one process; fetch its reply with `reply`, unless it is one of the `!jobs`, that have none."""
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

    def connect(self, world: int, kind: str, stripes: int = 1) -> None:
        """Give the first `world` processes a transport of a new epoch."""
        self.epoch += 1
        for rank in range(world):
            given = {"kind": kind, "addresses": self.addresses[:world], "epoch": self.epoch, "stripes": stripes}
            self.start(rank, "connect", rank=rank, **given)
        for rank in range(world):
            reply = self.reply(rank)
            assert not reply.error, reply.message

    def kill(self, rank: int, signum: signal.Signals) -> None:
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


class _Hand:
    """One process: takes jobs, each in a thread of its own; those named `!...` are done at once."""

    def __init__(self, connection: Connection) -> None:
        from collectives.staging import StagingPool
        from collectives.transports.mesh import LinkListener

        self.connection = connection
        self.listener = LinkListener()
        self.transport: Any = None
        self.pool = StagingPool()

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

    def do_connect(self, kind: str, rank: int, addresses: list[tuple[str, int]], epoch: int, stripes: int = 1) -> None:
        self.do_make(kind, rank, addresses, epoch, stripes)
        self.do_link()

    def do_make(self, kind: str, rank: int, addresses: list[tuple[str, int]], epoch: int, stripes: int = 1) -> None:
        """The first half of `connect`: an abort that comes after it strikes the new transport, not the old one."""
        if self.transport is not None:
            self.transport.close()
        from collectives.transports.site import Site

        made = getattr(importlib.import_module(f"collectives.transports.{kind}"), KINDS[kind])
        self.transport = made(Site(self.listener, rank, addresses, KEY, epoch, b"nonce", stripes=stripes))

    def do_emulate(self, kind: str, rank: int, addresses: list[tuple[str, int]], epoch: int, network: str) -> None:
        """`connect`, held to the topology of which `network` is the JSON."""
        from collectives.topology_file import parse
        from collectives.transports.emulated import emulate

        self.do_make(kind, rank, addresses, epoch)
        self.transport = emulate(self.transport, parse(network), KEY, epoch, b"nonce")
        self.do_link()

    def do_link(self, timeout: float = 20.0) -> None:
        self.transport.connect(timeout)

    def do_abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def do_close(self) -> None:
        self.transport.close()

    def do_send(self, peer: int, sizes: list[int], dtype: str, registered: bool = False) -> None:
        """Send tensors of these sizes, all posted at once; their values name rank and position."""
        import torch

        from collectives.arena import process_arena

        empty: Callable[..., Any] = process_arena().empty if registered else torch.empty
        tensors = [
            empty(size, dtype=getattr(torch, dtype)).fill_(self.transport.rank * 10 + i) for i, size in enumerate(sizes)
        ]
        for pending in [self.transport.send(peer, tensor, 1) for tensor in tensors]:
            pending.wait()

    def do_receive(self, peer: int, sizes: list[int], dtype: str) -> list[bool]:
        """Receive what `do_send` sends; whether each is right."""
        import torch

        tensors = [torch.zeros(size, dtype=getattr(torch, dtype)) for size in sizes]
        for pending in [self.transport.recv(peer, tensor, 1) for tensor in tensors]:
            pending.wait()
        return [bool(tensor.eq(peer * 10 + i).all()) for i, tensor in enumerate(tensors)]

    def do_note(self, peer: int) -> bytes:
        note = self.transport.recv_note(peer, 1)
        assert isinstance(note, bytes)
        return note

    def do_echo(self, peer: int, size: int, first: bool, bulk: bool) -> float:
        """Send so many bytes to a peer and back; the seconds that the first of the two saw pass."""
        import torch

        data = torch.zeros(size, dtype=torch.uint8)
        begun = time.monotonic()
        for sends in (first, not first):
            if bulk:
                (self.transport.send if sends else self.transport.recv)(peer, data, 1).wait()
            elif sends:
                self.transport.send_note(peer, bytes(size), 1)
            else:
                assert len(self.transport.recv_note(peer, 1)) == size
        return time.monotonic() - begun

    def do_patience(self, peer: int, timeout: float) -> tuple[bool, int]:
        """Whether a note did not come in so many seconds, and its length when it came after all."""
        from collectives.errors import OperationTimeout

        try:
            self.transport.recv_note(peer, 1, timeout)
            late = False
        except OperationTimeout:
            late = True
        return late, len(self.transport.recv_note(peer, 1))

    def do_traffic(self) -> dict[str, list[int]]:
        """What an emulated transport counted."""
        from dataclasses import asdict

        return asdict(self.transport.traffic)

    def do_usage(self) -> tuple[int, int, int]:
        """Threads, descriptors, and resident KiB of this process."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
        return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir())), resident

    def do_rebuild(self, kind: str, times: int, rank: int, addresses: list[tuple[str, int]], epoch: int) -> None:
        """Build and close transports; every other one after an exchange, every third with a receive in flight."""
        import torch

        from collectives.confirm import confirm
        from collectives.errors import TransportLost

        world, size = len(addresses), 50_000
        for number in range(times):
            self.do_connect(kind, rank, addresses, epoch + number)
            if number % 2:
                data, into = torch.full((size,), float(rank)), torch.empty(size)
                receive = self.transport.recv((rank - 1) % world, into, 2)
                sent = self.transport.send((rank + 1) % world, data, 2)
                receive.wait()
                sent.wait()
                assert into.eq((rank - 1) % world).all()
            confirm(self.transport, 4, b"here")  # nobody goes while another still connects
            if number % 3 == 0:
                receive = self.transport.recv((rank + 1) % world, torch.empty(size), 3)
                self.transport.abort()
                try:
                    receive.wait()
                except TransportLost:
                    continue
                raise AssertionError("an aborted receive returned")
        self.transport.close()

    def do_quarantine(self, peer: int) -> tuple[bool, bool]:
        """Whether memory in flight is kept after the abort, and let go after the close, though the pending is kept."""
        import torch

        into = torch.empty(300_000)
        gone = weakref.ref(into.untyped_storage())
        pending = self.transport.recv(peer, into, 3)
        del into
        self.transport.abort()
        kept = gone() is not None
        self.transport.close()
        del pending
        return kept, gone() is None

    def do_blocked(self, case: dict[str, Any]) -> None:
        """Run collectives until the transport gives up."""
        while True:
            self.do_collective(case)

    def do_collective(self, case: dict[str, Any]) -> tuple[str, list[str]]:
        """Run a schedule; the digest of the result where it is wanted, and the probe points that were passed."""
        import torch

        from collectives.confirm import confirm
        from collectives.engine import Engine
        from collectives.reduction import ReduceOp

        module = importlib.import_module(f"collectives.algorithms.{case['algorithm']}")
        rank, world, count = self.transport.rank, self.transport.size, case["count"]
        schedule = getattr(module, case["kind"])(world, count, **case.get("arguments", {}))
        dtype = getattr(torch, case["dtype"])
        reduces = case["kind"] in ("all_reduce", "reduce_scatter")
        work_dtype = torch.float32 if reduces and dtype.itemsize == 2 else dtype
        engine = Engine(self.pool, case.get("segment", 2**20), case.get("window", 4), case.get("note", 2**19))
        program = engine.program(schedule, self.transport, dtype, work_dtype, case.get("lift", True))
        staging = self.pool.take(program.footprint, work_dtype)
        staging.fill_(77)
        whole = odd_values(rank, count) if case.get("odd") else values_of(rank, count, dtype)
        source = torch.cat([whole[start:stop] for start, stop in schedule.held(rank)] or [whole[:0]])
        before = source.clone()
        points: list[str] = []
        engine.run(
            schedule,
            self.transport,
            case.get("channel", 5),
            source,
            staging,
            ReduceOp(case.get("op", "sum")),
            {"finish": lambda piece: piece.mul_(3)},
            points.append,
            case.get("lift", True),
        )
        confirm(self.transport, case.get("channel", 5), b"done")  # now nobody needs our memory any more
        assert torch.equal(source.view(torch.uint8), before.view(torch.uint8)), "the caller's tensor was written"
        parts = program.pieces(source, staging)
        return digest(torch.cat(parts or (staging[:0],)), bits=case.get("odd", False)), points

    def do_barrier(self) -> None:
        """Run the barrier's schedule, which moves nothing."""
        import torch

        from collectives.algorithms.dissemination import barrier
        from collectives.engine import Engine

        nothing = torch.empty(0)
        Engine(self.pool).run(barrier(self.transport.size), self.transport, 5, nothing, nothing)

    def do_lanes(self, case: dict[str, Any], channels: list[int], times: int) -> list[bool]:
        """Run collectives in several threads at once, a channel each; whether all results are the same."""
        results: list[Any] = []

        def lane(channel: int) -> None:
            results.extend(self.do_collective({**case, "channel": channel})[0] for _ in range(times))

        threads = [threading.Thread(target=lane, args=(channel,)) for channel in channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == times * len(channels)
        return [result == results[0] for result in results]


def values_of(rank: int, count: int, dtype: Any) -> Any:
    """What a rank contributes: small whole numbers, so that every dtype adds them exactly."""
    import torch

    return ((torch.arange(count) * 7 + rank * 3) % 5 + rank % 2).to(dtype)


def digest(result: Any, bits: bool = False) -> str:
    """Names the numbers of a result, whatever their dtype; or its bits."""
    import torch

    words = result.view(torch.uint8) if bits else result.to(torch.float64).view(torch.uint8)
    return hashlib.sha256(words.numpy().tobytes()).hexdigest()


def odd_values(rank: int, count: int) -> Any:
    """Zeros of both signs and NaNs of unlike payload: what does not commute to the bit."""
    import torch

    words = torch.zeros(count, dtype=torch.int32)
    words[rank::2] = -(2**31)
    words[rank % 3 :: 5] = 0x7FC00000 + rank + 1
    return words.view(torch.float32)


def _main(path: str, size: int) -> None:
    import torch

    import collectives.engine  # noqa: F401 - here and not in every child

    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            connection = Client(path, "AF_UNIX")
            hand = _Hand(connection)
            connection.send((rank, os.getpid(), hand.listener.address))
            hand.serve()
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
