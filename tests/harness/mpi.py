"""Clusters whose peers are the ranks of a real `mpirun`: Open MPI of this environment, MPICH of a second one.

    with Residents(4, transport="mpi", cluster=OPEN_MPI) as group:
        group.run(operations.barriers)

Like `Cluster`, but `peers` starts one mpirun; it can do so once. The launcher's own end says little (its exit code is
137 or 0 after the same death), so what counts is what the ranks themselves say and return. Leaving the cluster ends the
launcher, its daemons and all ranks: they are one process group, and each rank watches its line to the test.
"""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.cluster import PATIENCE, ROOT, TOKEN, Child, Cluster, Process

_GRACE = 3.0
"""Seconds that the launcher gets to end, by itself and then by SIGTERM; it does not always."""


@dataclass(frozen=True)
class Library:
    """An MPI library: its launcher with options, the Python that has its mpi4py, and what it needs as environment."""

    name: str
    launcher: tuple[str, ...]
    python: str
    environ: Mapping[str, str]
    ends_survivors: bool
    """Whether a rank's death may end the others too."""


def _open_mpi() -> Library:
    home = Path(sys.prefix) / "bin"
    environ = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return Library(
        "Open MPI", (str(home / "mpirun"), "--oversubscribe", "--with-ft", "ulfm"), sys.executable, environ, False
    )


def _mpich() -> Library:
    home = Path(os.environ.get("RINGHOLD_MPICH", ROOT / ".venv-mpich")) / "bin"
    # Without the option its launcher kills the survivors of a death.
    return Library("MPICH", (str(home / "mpiexec"), "-disable-auto-cleanup"), str(home / "python"), {}, True)


LIBRARIES = {"openmpi": _open_mpi(), "mpich": _mpich()}


class Rank(Process):
    """A rank of the job, seen from the test. Its parent is the launcher, so that its exit code is not ours to know.

    `frail`: it may be ended by the launcher when another dies.
    """

    def __init__(self, name: str, pid: int, line: socket.socket, log: Path, frail: bool) -> None:
        super().__init__(name, Child(0, pid, os.pidfd_open(pid)), line, log)
        self.killed = frail

    def expect(self, *events: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait for one of `events`; "fired" is what a program says before it kills itself."""
        one = super().expect(*events, timeout=timeout)
        self.killed |= one["event"] == "fired"
        return one

    def status(self, timeout: float) -> int:
        """Wait for the end of the process: 0 if it has said how its program ended, -9 if it was killed.

        A process that ends in any other way fails the test.
        """
        assert select.select([self._child.handle], [], [], timeout)[0], f"{self} did not end in {timeout} s"
        if self.said("ended"):
            return 0
        assert self.killed or self.said("fired"), f"{self} ended without a word, {self._story()}"
        return -signal.SIGKILL


class MpiCluster(Cluster):
    """A cluster of the ranks of one MPI job; the arguments are those of `Cluster`."""

    def __init__(self, library: str, **options: Any) -> None:
        self._library = LIBRARIES[library]
        self._launcher: subprocess.Popen[bytes] | None = None
        super().__init__(**options)

    def peers(self, program: str | Callable[..., Any], count: int, /, **given: Any) -> list[Process]:
        """Start a job of `count` ranks, by rank in the job; all run the same program."""
        assert self._launcher is None, "a cluster has one job"
        reference = program if isinstance(program, str) else f"{program.__module__}:{program.__qualname__}"
        setting = {
            "address": self.address,
            "run": self.RUN,
            "token": TOKEN,
            "transport": "mpi",
            "options": self.options,
        }
        where = self.folder / "ranks"
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMI", "PRTE_"))}
        environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **self._library.environ}
        with socket.socket(socket.AF_UNIX) as listener, (self.folder / "mpirun.log").open("wb") as log:
            listener.bind(str(where))
            listener.listen(count)
            self._launcher = subprocess.Popen(
                [
                    *self._library.launcher,
                    "-n",
                    str(count),
                    self._library.python,
                    "-m",
                    "tests.harness.mpi_rank",
                    where,
                ],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ranks = sorted((self._meet(listener) for _ in range(count)), key=lambda one: one.name)
        self.processes += ranks
        for rank in ranks:
            rank.tell("start", program=reference, setting=setting, given=given)
        return list(ranks)

    def close(self) -> None:
        """End the launcher and all that it started."""
        if self._launcher is not None:
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if number is not None:
                    os.killpg(self._launcher.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._launcher.wait(_GRACE)
                    break
        super().close()

    def _meet(self, listener: socket.socket) -> Rank:
        """Take the line of one rank; it says who it is."""
        assert self._launcher is not None
        deadline = time.monotonic() + PATIENCE
        while not select.select([listener], [], [], 0.1)[0]:
            said = (self.folder / "mpirun.log").read_text(errors="replace")
            assert self._launcher.poll() is None, f"the launcher ended: {said}"
            assert time.monotonic() < deadline, f"the launcher started nothing in {PATIENCE} s: {said}"
        line, _ = listener.accept()
        with line.makefile("rb", buffering=0) as file:
            who = json.loads(file.readline())
        return Rank(who["name"], who["pid"], line, Path(who["log"]), self._library.ends_survivors)


OPEN_MPI = functools.partial(MpiCluster, "openmpi")
MPICH = functools.partial(MpiCluster, "mpich")
