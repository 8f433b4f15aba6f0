"""Peers that are ranks of one MPI job: the crew of the churn lab over transport "mpi". Used by `launch.churn`.

Founders start together under one `mpirun --with-ft ulfm`. Whoever comes later is spawned by a member: one that works is
asked through the word `SPAWN`, another one if the first dies meanwhile. What the launcher starts is a small process
that holds the place (`crew_place`); the peer is forked here, as any other, and is given that place.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from collectives.communicator import Communicator
from collectives.errors import Unsupported, UsageError
from launch import mpirun
from launch.child import die_with_parent
from launch.crew import Crew, Desk, Message, Peer
from launch.network import Network

SPAWN = 14
"""The word by which a member is asked to spawn a peer: 1 + its name; the member sets it to 0 when it takes it."""
_CREW = "RINGHOLD_CREW"
_PLACE = (sys.executable, "-I", "-S", str(Path(__file__).with_name("crew_place.py")))
_GRACE = 5.0
"""Seconds in which the launcher is to end by itself, when all ranks have ended."""
_PATIENCE = 3.0
"""Seconds that a member gets to take a request, and a newcomer to start MPI after the death of who spawned it."""

Work = Callable[[Desk], None]


class Place:
    """A process of the launcher that holds the place of a rank."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.pid, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.ours = user == os.geteuid()
        self.peer = -1
        self.environ: dict[str, str] = {}
        self._said = b""

    def hear(self) -> bool:
        """Take what it has said; whether that is all that it has to say.

        Raises:
            ConnectionError: it is dead.

        """
        data = self.line.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        self._said += data
        if not self._said.endswith(b"\n"):
            return False
        offer = json.loads(self._said)
        self.peer, self.environ = offer["peer"], offer["environ"]
        return True

    def end(self, code: int) -> None:
        """Have it end as its rank did: with an exit code, or -N by signal N."""
        with contextlib.suppress(OSError):  # it is dead already
            self.line.sendall(f"{code}\n".encode())
        self.line.close()


class _Newcomer:
    """A peer that is not a rank yet: what it is to do, who was asked to spawn it, and when that was last well."""

    def __init__(self, peer: Peer, work: Work) -> None:
        self.peer, self.work = peer, work
        self.asked: Peer | None = None
        self.since = 0.0
        self.started = False

    @property
    def orphaned(self) -> bool:
        """Whether the member that was to spawn it has died: then it cannot start MPI, or waits there for ever."""
        return self.asked is not None and not self.asked.alive and not self.started

    def begin_again(self) -> None:
        """It has no process any more; somebody else is to spawn it."""
        self.peer.process = self.asked = None


class RankCrew(Crew):
    """A crew of ranks; see `Crew`. As many peers as the options have founders start together."""

    join_seconds = 0.6

    def __init__(self, options: Mapping[str, Any], network: Network | None = None, folder: Path | None = None) -> None:
        self._name = f"ringhold-crew-{secrets.token_hex(8)}"
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(f"\0{self._name}")
        self._door.listen(64)
        self._callers: list[Place] = []
        self._places: dict[int, Place] = {}
        self._newcomers: dict[int, _Newcomer] = {}
        self._connecting: set[int] = set()
        self._launcher: subprocess.Popen[bytes] | None = None
        super().__init__(options, network, folder)

    def start_peer(self, work: Work) -> Peer:
        """Start a peer; see `Crew`. Founders start when all were asked for, others when a member has spawned them."""
        peer = self._enlist()
        self._newcomers[peer.name] = _Newcomer(peer, work)
        if len(self.peers) == self._options.founders:
            self._launch()
        return peer

    def tend(self, members: Sequence[Peer]) -> None:
        """Fork those who have a place, and see to it that others get one; `members` work."""
        while select.select([self._door], [], [], 0)[0]:
            self._callers.append(Place(self._door.accept()[0]))
        for caller in select.select([place.line for place in self._callers], [], [], 0)[0]:
            self._let_in(next(place for place in self._callers if place.line is caller))
        for newcomer in list(self._newcomers.values()):
            if newcomer.peer.name >= self._options.founders:
                self._see_to(newcomer, members)

    def spares(self, peer: Peer) -> bool:
        """See `Crew.spares`: Open MPI's launcher may hang when a process dies that spawns, starts or connects."""
        spawn = any(peer in (newcomer.asked, newcomer.peer) for newcomer in self._newcomers.values())
        return spawn or peer.name in self._connecting

    def receive(self, timeout: float) -> list[tuple[Peer, Message]]:
        """See `Crew.receive`."""
        heard = []
        for peer, message in super().receive(timeout):
            newcomer = self._newcomers.get(peer.name)
            if message["type"] == "gone":
                self._places.pop(peer.name).end(message["code"])
                if newcomer is not None and message["code"] > 0 and newcomer.orphaned:
                    self.living[peer.name] = peer
                    newcomer.begin_again()
                    continue
            match message:
                case {"type": "rank"} if newcomer is not None:
                    newcomer.started = True
                    if newcomer.asked is None:
                        del self._newcomers[peer.name]
                case {"type": "spawned", "peer": name}:
                    self._newcomers.pop(name, None)
                case {"type": "event", "event": "epoch"}:
                    self._connecting.add(peer.name)
                case {"type": "event", "event": "ready" | "evicted" | "left"}:
                    self._connecting.discard(peer.name)
                case {"type": "gone"}:
                    self._connecting.discard(peer.name)
                    self._newcomers.pop(peer.name, None)
            heard.append((peer, message))
        return heard

    def close(self) -> None:
        """End everything that is still there: the ranks, then the launcher and what it started, and their memory."""
        segments = {segment for peer in self.living.values() for segment in _segments(peer.pid)}
        for peer in self.living.values():
            code = peer.end()
            if peer.name in self._places:
                self._places[peer.name].end(code)
        for caller in self._callers:
            caller.end(0)
        self._door.close()
        if self._launcher is not None:
            _end(self._launcher)
        for segment in segments:
            segment.unlink(missing_ok=True)
        super().close()

    def _launch(self) -> None:
        program, path, _ = mpirun.find()
        kept = {key: text for key, text in os.environ.items() if not key.startswith(("OMPI_", "PMI", "PRTE_"))}
        environ = {"OMP_NUM_THREADS": "1", **kept, **mpirun.OPEN_MPI_ENVIRON, "PATH": path, _CREW: self._name}
        with (self.folder / "mpirun.log").open("wb") as log:
            self._launcher = subprocess.Popen(
                [program, "--with-ft", "ulfm", *mpirun.OPEN_MPI, "-n", str(self._options.founders), *_PLACE],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - this process has one thread
            )

    def _let_in(self, place: Place) -> None:
        """Hear what a place is for, and fork its peer."""
        try:
            if place.ours and not place.hear():
                return
        except (OSError, ValueError, KeyError):
            place.peer = -1
        self._callers.remove(place)
        newcomer = self._newcomers.get(place.peer)
        if newcomer is None or newcomer.peer.process is not None:
            place.end(0)  # dead, or spawned once more because the first had been given up
            return
        self._places[place.peer] = place
        self._fork(newcomer.peer, partial(_be_rank, place.environ, newcomer.work))

    def _see_to(self, newcomer: _Newcomer, members: Sequence[Peer]) -> None:
        """Ask somebody to spawn a newcomer; again, of another one, if that has come to nothing."""
        now, asked, name = time.monotonic(), newcomer.asked, newcomer.peer.name
        if asked is None:
            free = [member for member in members if not member.words[SPAWN]]
            if free:
                newcomer.asked, newcomer.since = free[name % len(free)], now
                newcomer.asked.words[SPAWN] = 1 + name
        elif newcomer.started and not asked.alive:
            del self._newcomers[name]
        elif asked.alive and asked.words[SPAWN] != 1 + name:  # it has taken the request
            newcomer.since = now
        elif now - newcomer.since > _PATIENCE:
            if asked.alive:
                asked.words[SPAWN] = 0
            if newcomer.peer.process is not None:
                self._places.pop(name).end(newcomer.peer.end())
            newcomer.begin_again()


def spawn(comm: Communicator, name: int) -> None:
    """Start a peer of the crew that this process is of; returns when it has started MPI. See `Communicator.spawn`."""
    comm.spawn([*_PLACE, str(name)])


def require() -> None:
    """Raise unless ranks can be started here, can go on after a death, and can be spawned.

    Raises:
        UsageError: there is no launcher, or no mpi4py.
        Unsupported: the launcher is another one than Open MPI's.

    """
    program, _, open_mpi = mpirun.find()
    if importlib.util.find_spec("mpi4py") is None:
        raise UsageError('--transport mpi needs mpi4py; install it: pip install "ringhold[mpi]"')
    if not open_mpi:
        raise Unsupported(f"{program} is not Open MPI's; under others nobody outlives a death, and nobody is spawned")


def _be_rank(environ: Mapping[str, str], work: Work, desk: Desk) -> None:
    """In the forked process: take a place, and do the work."""
    from collectives.transports import mpi_world

    os.environ.update(environ)
    mpi_world.enter()
    desk.report("rank")
    work(desk)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher's end; what is left then, of it and of its children, is ended by process id."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(_GRACE)
        return
    for pid in [*_descendants(launcher.pid), launcher.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()
    shutil.rmtree(Path(tempfile.gettempdir()) / f"ompi.{launcher.pid}", ignore_errors=True)


def _segments(pid: int) -> set[Path]:
    """The shared memory of Open MPI that a process maps: a launcher that had to be killed does not remove it."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {Path(line.split()[-1]) for line in lines if " /dev/shm/sm_segment." in line and not line.endswith(")")}


def _descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [*_descendants(child), child]
    return found
