"""Who starts the ranks of a benchmark, and how they find each other: alone, under a launcher, or through mpirun.

- `alone`: this process starts the coordinators and the ranks as its children, and ends them all, however it ends.
- `launched`: this process is a rank; that of number 0 hosts the coordinators and tells the others through
  `launch.rendezvous`.
- `through_mpirun`: this process becomes mpirun, which starts ranks that are `launched`.

Each run of a benchmark (`Request.runs`) has a coordinator of its own, because a run has one transport.
"""

import os
import queue
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

from collectives import errors
from collectives.errors import OperationTimeout, RingholdError, UsageError
from launch import mpirun
from launch.environment import Launcher, peer_environment
from launch.process import Child, Inbox, end_all
from launch.rendezvous import Rendezvous

_START_SECONDS = 60.0
"""Until the coordinators listen, or rank 0 has told where they do."""
_END_SECONDS = 60.0
"""Until the other ranks have ended, once rank 0 has."""


BeRank = Callable[[Any, Launcher, Mapping[str, str], str, Any], int]
"""(request, launcher, coordinators by run, token, show): be a rank; how many values were wrong."""


class Asked(Protocol):
    """What a benchmark is asked to do: `bench_request.Request`, or that of another command."""

    @property
    def runs(self) -> dict[str, str]:
        """The runs that it needs a coordinator for, each with its transport."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""


class Company:
    """The children of a benchmark and what they say. A context manager that ends them all."""

    def __init__(self, token: str, environ: Mapping[str, str]) -> None:
        self._inbox: Inbox = queue.SimpleQueue()
        self._folder = tempfile.TemporaryDirectory(prefix="ringhold-bench-")
        self._children: dict[str, Child] = {}
        self._environ = {**environ, "RINGHOLD_TOKEN": token}
        self._environ.pop("RINGHOLD_TOKEN_FILE", None)

    def __enter__(self) -> "Company":
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self._children.values())
        self._folder.cleanup()

    def start(self, name: str, module: str, *arguments: str, **environ: str) -> Child:
        """Start `python -m module arguments`."""
        log = Path(self._folder.name) / f"{name}.log"
        command = [sys.executable, "-m", module, *arguments]
        child = Child(name, command, {**self._environ, **environ}, log=log, inbox=self._inbox)
        self._children[name] = child
        return child

    def host(self, runs: Iterable[str], ranks: int) -> dict[str, str]:
        """Start a coordinator for each run; return the runs' addresses once all listen."""
        waiting = {f"coordinator of {run}": run for run in runs}
        for number, (name, run) in enumerate(waiting.items()):
            journal = f"{self._folder.name}/{number}.journal"
            where = ("--listen", "127.0.0.1:0", "--journal", journal, "--new", "--run", run)
            self.start(name, "launch.coordinator", *where, RINGHOLD_FOUNDERS=str(ranks))
        addresses: dict[str, str] = {}
        deadline = time.monotonic() + _START_SECONDS
        while len(addresses) < len(waiting):
            name, message = self.hear(deadline)
            if message["type"] == "listening":
                addresses[waiting[name]] = message["address"]
        return addresses

    def hear(self, deadline: float | None = None) -> tuple[str, dict[str, Any]]:
        """Wait for the next message of a child.

        Raises:
            RingholdError: a child reported an error (raised as what it is), or ended otherwise than well.
            OperationTimeout: none came until `deadline` (of time.monotonic).

        """
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            name, message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            raise OperationTimeout(f"the coordinators did not listen within {_START_SECONDS:g} s") from None
        if message["type"] == "error":
            kind = getattr(errors, message["error"], RingholdError)
            raise kind(message["message"])
        if message["type"] == "exit" and message["code"]:
            tail = self._children[name].tail()
            raise RingholdError(f"{name} ended with {_ending(message['code'])}; the last it said:\n{tail}")
        return name, message


def alone(request: Asked, ranks: int, show: Any, module: str = "launch.bench_child") -> int:
    """Run all from here; `show` gets the messages of rank 0. Return how many values were wrong.

    Raises:
        RingholdError: what ended a rank.

    """
    environ = peer_environment(os.environ)
    environ.setdefault("OMP_NUM_THREADS", "1")
    token = secrets.token_urlsafe(32)
    with Company(token, environ) as company:
        children = [company.start(f"rank {rank}", module) for rank in range(ranks)]
        addresses = company.host(request.runs, ranks)  # meanwhile the ranks import torch
        for rank, child in enumerate(children):
            place = {"rank": rank, "ranks": ranks, "coordinators": addresses, "token": token}
            child.send({"request": request.to_json(), "place": place})
        wrong, running = 0, set(range(ranks))
        while running:
            name, message = company.hear()
            if message["type"] == "exit":
                running.discard(int(name.removeprefix("rank ")))
            else:
                show(message)
                wrong = message.get("wrong", 0) if message["type"] == "done" else wrong
        return int(wrong)


def launched(request: Asked, launcher: Launcher, show: Any, be_rank: "BeRank | None" = None) -> int:
    """Be the rank that the launcher started; rank 0 hosts the coordinators. Return how many values were wrong.

    Raises:
        UsageError: the launch spans hosts.
        RingholdError: what ended this rank.

    """
    be_rank = be_rank or _be_rank
    if not launcher.one_host:
        raise UsageError(f"bench measures on one host, and {launcher.title} started processes on several")
    meeting = Rendezvous.of_launcher(launcher, os.environ)
    if launcher.rank:
        facts = meeting.wait(_START_SECONDS)
        wrong = be_rank(request, launcher, facts["coordinators"], meeting.token_file.read_text(), show)
        meeting.leave_record({})
        meeting.verdict(_END_SECONDS)
        return wrong
    token = secrets.token_urlsafe(32)
    with Company(token, peer_environment(os.environ)) as company:
        try:
            addresses = company.host(request.runs, launcher.size)
            meeting.publish({"coordinators": addresses}, token)
            wrong = be_rank(request, launcher, addresses, token, show)
            for rank in range(1, launcher.size):
                meeting.record_of(rank, _END_SECONDS)
        finally:
            meeting.announce(0)
    return wrong


def through_mpirun(ranks: int) -> NoReturn:
    """Become mpirun, which runs this very command as `ranks` processes.

    Raises:
        UsageError: there is no mpirun.

    """
    program, path, open_mpi = mpirun.find()
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}
    command = [program, "-n", str(ranks)]
    if open_mpi:
        command += mpirun.OPEN_MPI
        environ |= mpirun.OPEN_MPI_ENVIRON
    sys.stdout.flush()
    os.execve(program, [*command, sys.executable, *sys.orig_argv[1:]], environ)


def _be_rank(request: Any, launcher: Launcher, addresses: Mapping[str, str], token: str, show: Any) -> int:
    from launch.bench_rank import Place, Rank  # imports torch

    with Rank(request, Place(launcher.rank, launcher.size, addresses, token), show) as rank:
        return rank.measure()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
