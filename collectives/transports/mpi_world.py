"""This process's part in MPI: the library, started on demand, and who we are in it. Used by `mpi` alone.

MPI lives as long as the process, transports live for an epoch. So what outlasts an epoch is here: the tags that were
given out, and the transfers that an aborted epoch left behind (`mpi_leftovers`).

All traffic is point to point, with tags from the upper half of their range: on COMM_WORLD, and between processes that
were not started together on communicators of two (`mpi_spawn`). None of several is made: that is a collective, which a
rank that is dead or stopped would hang. A program that uses mpi4py itself beside this package keeps to lower tags, and
does not receive from any source with any tag on COMM_WORLD.
"""

import atexit
import contextlib
import itertools
import os
import secrets
import signal
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from collectives.errors import Unsupported
from collectives.transports.mpi_leftovers import Leftovers

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""What `mpirun --with-ft ulfm` of Open MPI sets."""
INSTALL = 'pip install "ringhold[mpi]" (mpi4py and Open MPI 5)'


class Universe(NamedTuple):
    """A communicator, under a name that all its processes know it by and no others have, and our rank in it."""

    name: str
    comm: "Intracomm"
    rank: int


class Place(NamedTuple):
    """Where another process is: its rank in the universe of that name."""

    universe: str
    rank: int


class World:
    """The MPI job that this process belongs to. Make it with `enter`.

    Attributes:
        job: the universe of the ranks that started together with this one.
        universes: all that this process is in, by name: the job, and one with each process of others that it met.
        recovers: whether the library lets survivors go on after a death.
        guard: held around each call of MPI; a real lock only where the library wants calls one at a time.
        refusal: why this process can have no more transports, once that is so.
        leftovers: transfers of former epochs that are not over.
        failure: of the library: what its calls raise.

    """

    def __init__(self) -> None:
        mpi = _import()
        level = _start(mpi)
        if level < mpi.THREAD_SERIALIZED:
            raise Unsupported(
                "the transport mpi calls MPI from several threads, and this library was started without leave for "
                "that; let Ringhold start it, or start it with MPI.Init_thread(MPI.THREAD_MULTIPLE)"
            )
        self.mpi = mpi
        comm: Intracomm = mpi.COMM_WORLD
        comm.Set_errhandler(mpi.ERRORS_RETURN)
        self.library = f"{mpi.get_vendor()[0]} {'.'.join(map(str, mpi.get_vendor()[1]))}"
        self.recovers = self.library.startswith("Open MPI")
        if not self.recovers:
            _ignore_notices()
        self.job = Universe(self._name_job(comm), comm, comm.Get_rank())
        self.universes = {self.job.name: self.job}
        self.guard: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if level == mpi.THREAD_MULTIPLE else threading.Lock()
        )
        self.failure = mpi.Exception
        self.leftovers = Leftovers(self)
        largest: Any = comm.Get_attr(mpi.TAG_UB)
        self._tags = itertools.cycle(range(largest // 2, largest))
        self.refusal: Unsupported | None = None
        self._met: dict[bytes, set[int]] = {}

    def new_tag(self) -> int:
        """Return a tag that this process has not sent with before (or hundreds of millions of streams ago)."""
        return next(self._tags)

    def missing(self, run: bytes, present: set[int]) -> set[int]:
        """Take note of the ranks of the job that are in a run; return those that were in it and are not now."""
        met = self._met.setdefault(run, set())
        met |= present
        return met - present

    def memory(self, address: int, count: int) -> list[Any]:
        """Describe so many bytes at an address to MPI."""
        return [self.mpi.memory.fromaddress(address, count), count, self.mpi.BYTE]

    def progress(self) -> None:
        """Let the library send what it has kept back, as where a connection was full."""
        with contextlib.suppress(self.failure), self.guard:
            self.mpi.COMM_SELF.Iprobe()

    def add(self, universe: Universe) -> None:
        """Take note of a universe."""
        self.universes[universe.name] = universe

    def find(self, places: Mapping[str, int]) -> Place | None:
        """Where a process is that has these ranks in its universes; None if we have no universe in common."""
        name = next((name for name in self.universes if name in places), None)
        return None if name is None else Place(name, places[name])

    def may_meet(self, job: str) -> bool:
        """Whether a process of another job, of that name, has the same launcher, so that MPI can connect us."""
        launcher, _, number = self.job.name.rpartition("@")
        return self.recovers and bool(launcher) and number.isdecimal() and job.rpartition("@")[0] == launcher

    def _name_job(self, comm: "Intracomm") -> str:
        if self.recovers:  # no collective: another rank may be gone already
            return os.environ.get("PMIX_NAMESPACE") or secrets.token_hex(16)
        return str(comm.bcast(secrets.token_hex(16)))


def _import() -> Any:
    try:
        import mpi4py
    except ImportError:
        raise Unsupported(f"the transport mpi needs mpi4py, which is not installed; {INSTALL}") from None
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise Unsupported(f"mpi4py finds no MPI library ({error}); {INSTALL}") from None
    return MPI


def _start(mpi: Any) -> int:
    """Start the library unless the program did; return the thread level."""
    if mpi.Is_finalized():
        raise Unsupported("this process has finalized MPI, which cannot be started again; start a new process")
    if mpi.Is_initialized():
        return int(mpi.Query_thread())
    level = int(mpi.Init_thread(mpi.THREAD_MULTIPLE))
    atexit.register(_finish, mpi)
    return level


def _ignore_notices() -> None:
    """MPICH's launcher tells survivors of a death by SIGUSR1, and the handler that MPICH sets for it may crash them."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _finish(mpi: Any) -> None:
    """At the end of a process that started MPI, finalize it: most launchers take an end without that for a failure.

    Finalizing waits for all ranks of the job. Open MPI's launcher with fault tolerance lets processes end without; and
    after a death that the library does not survive, MPICH would end the other survivors as well.
    """
    if os.environ.get(_FAULT_TOLERANT) == "1":
        return
    refusal = _world.refusal if _world is not None else None
    if refusal is None or refusal.__traceback__ is None:  # nobody was told: the others have left, but are well
        mpi.Finalize()


_world: World | None = None
_lock = threading.Lock()


def enter() -> World:
    """Return this process's world; the first call starts MPI, together with all other ranks of the job.

    Raises:
        Unsupported: mpi4py or a library is missing, or the library cannot be used from threads.

    """
    global _world
    with _lock:
        if _world is None:
            _world = World()
        return _world
