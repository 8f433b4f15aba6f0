"""Ranks that start while an MPI job runs, and how two processes of a launcher come to a communicator. Used by `mpi`.

A member spawns ranks alone (`MPI_Comm_spawn` on COMM_SELF); they join the run as any peer does. Whenever an epoch has
two members that were not started together, these two connect (`MPI_Comm_connect`, `accept`), once for the life of both.
So none of these calls involves a third process, which might be dead or stopped: making one communicator for all hangs
or fails then (`MPI_Comm_create_group` refuses a communicator with a dead rank, creation from a group never ends if a
member dies in it, shrinking never ends with a stopped one). A call whose other end dies may never return either: it is
left alone in its thread, and others work as before.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from collectives.errors import OperationTimeout, SpawnFailed

if TYPE_CHECKING:
    from collectives.transports.mpi_world import Universe, World

_GLANCE = 0.05
T = TypeVar("T")


def spawn(world: "World", command: Sequence[str], environ: Mapping[str, str], count: int, timeout: float) -> None:
    """Start `count` processes under this one's launcher; returns when they have started MPI.

    Args:
        world: this process's.
        command: program and arguments.
        environ: what is added to the environment that the launcher gave the first ranks. Values without line breaks.
        count: number of processes.
        timeout: seconds.

    Raises:
        SpawnFailed: the program cannot be started, or it took longer.

    """
    mpi = world.mpi

    def start() -> None:
        mpi.COMM_SELF.Set_errhandler(mpi.ERRORS_RETURN)
        info = mpi.Info.Create()
        info.Set("wdir", str(Path.cwd()))
        if environ:
            info.Set("env", "\n".join(f"{name}={value}" for name, value in environ.items()))
        for _ in range(count):  # each a job of its own: the launcher ends all ranks of a spawned job when one dies
            mpi.COMM_SELF.Spawn(command[0], list(command[1:]), maxprocs=1, info=info)

    try:
        bounded(start, timeout)
    except OperationTimeout:
        raise SpawnFailed(
            f"{command[0]} did not start MPI in {timeout:g} s; does it join over transport mpi?"
        ) from None
    except world.failure as error:
        raise SpawnFailed(f"{world.library} cannot start {command[0]}: {error}") from None


def open_port(world: "World") -> str:
    """Return the name of a port at which another process can connect, once."""
    return str(world.mpi.Open_port())


def meet(world: "World", port: str, accept: bool, timeout: float, given_up: Callable[[], bool]) -> "Universe":
    """Make a communicator with the process at the other end of a port, which does so at the same time.

    Raises:
        OperationTimeout: it did not come about in `timeout` seconds, or before it was `given_up`.
        The library's error: the other process died.

    """
    from collectives.transports.mpi_world import Universe

    def connect() -> "Universe":
        alone = world.mpi.COMM_SELF
        alone.Set_errhandler(world.mpi.ERRORS_RETURN)
        comm = alone.Accept(port) if accept else alone.Connect(port)
        comm.Set_errhandler(world.mpi.ERRORS_RETURN)
        return Universe(port, comm, 0)  # between two groups of one: either is rank 0 for the other

    return bounded(connect, timeout, given_up)


def bounded(work: Callable[[], T], timeout: float, given_up: Callable[[], bool] = lambda: False) -> T:
    """Return what `work` does, in a thread that is left behind if that takes too long.

    Raises:
        OperationTimeout: it did.
        What `work` raises.

    """
    done: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="ringhold-mpi", daemon=True)
    thread.start()
    while thread.is_alive() and timeout > 0 and not given_up():
        thread.join(min(_GLANCE, timeout))
        timeout -= _GLANCE
    if errors:
        raise errors[0]
    if not done:
        _left_behind.append(thread)
        raise OperationTimeout("a call of MPI did not return in time")
    return done[0]


_left_behind: list[threading.Thread] = []


def stuck() -> int:
    """Return how many calls of this process were left behind and have not returned yet; each keeps a thread."""
    return sum(thread.is_alive() for thread in _left_behind)
