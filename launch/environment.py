"""Who started this process: a person, torchrun, Open MPI or MPICH; and what of it a peer may inherit.

Called by `launch.train` (which becomes one supervisor with one peer under a launcher) and by `launch.doctor`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from collectives.errors import UsageError

LauncherKind = Literal["torchrun", "openmpi", "mpich"]

_TITLES: dict[str, str] = {"torchrun": "torchrun", "openmpi": "Open MPI's mpirun", "mpich": "MPICH's mpiexec"}
# Variable names per launcher: rank, size, rank on this host, size on this host.
_NAMES: dict[LauncherKind, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_STREAMING = "glibc.cpu.x86_non_temporal_threshold=0x2000000"
"""Copies of 32 MiB and more bypass the caches. The C library's own threshold follows from the size of the last-level
cache, which on a virtual machine is the whole host's: never reached, and a copy of 64 MiB takes 9 ms instead of 5. With
a lower one a result of 16 MiB would have to be fetched from memory by the operation that follows."""
# What makes a library in the peer believe that it is the process which the launcher started: torch.distributed's
# env:// initialisation, torchelastic's child handling, and the MPI libraries' wire-up.
_TORCH_NAMES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
_TORCH_PREFIXES = ("TORCHELASTIC_",)
_MPI_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "PRRTE_", "HYDI_", "HYDRA_", "MPI_LOCAL", "MPIR_CVAR_CH3")


@dataclass(frozen=True, slots=True)
class Launcher:
    """The place that a launcher gave this process.

    `attempt` counts the launcher's own restarts of all its processes (torchrun `--max-restarts`), 0 at first.
    """

    kind: LauncherKind
    rank: int
    size: int
    local_rank: int
    local_size: int
    attempt: int = 0

    @property
    def title(self) -> str:
        """The launcher's name for people."""
        return _TITLES[self.kind]

    @property
    def one_host(self) -> bool:
        """Whether every process of the launch runs on this host."""
        return self.local_size == self.size


def detect(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher that started this process, or None when a person did.

    torchrun counts first: an MPI launcher may have started it, and the innermost one placed this process.

    Raises:
        UsageError: a launcher's variables are there but make no sense.

    """
    if "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        return _read(environ, "torchrun", int(environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0))
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _read(environ, "openmpi", 0)
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:
        return _read(environ, "mpich", 0)
    return None


def peer_environment(environ: Mapping[str, str], keep_mpi: bool = False) -> dict[str, str]:
    """Return the environment for a peer: without the variables by which a launcher marks its own child.

    Unless it says otherwise, the C library gets to know from what size on copies are large. `keep_mpi` leaves the MPI
    library's variables in place, for a peer that itself speaks MPI.
    """
    prefixes = _TORCH_PREFIXES if keep_mpi else _TORCH_PREFIXES + _MPI_PREFIXES
    kept = {k: v for k, v in environ.items() if k not in _TORCH_NAMES and not k.startswith(prefixes)}
    return {"GLIBC_TUNABLES": _STREAMING, **kept}


def launcher_descriptors(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return the open descriptors that a process in this environment speaks to its MPI launcher on (MPICH's PMI)."""
    return (int(environ["PMI_FD"]),) if environ.get("PMI_FD", "").isdecimal() else ()


def _read(environ: Mapping[str, str], kind: LauncherKind, attempt: int) -> Launcher:
    names = _NAMES[kind]
    rank, size = _number(environ, kind, names[0]), _number(environ, kind, names[1])
    # An MPI launcher that does not tell the local size is taken to span hosts: that asks for more, never for less.
    local_rank = _number(environ, kind, names[2]) if names[2] in environ else 0
    local_size = _number(environ, kind, names[3]) if names[3] in environ else (1 if size > 1 else size)
    if not (0 <= rank < size and 0 <= local_rank < max(local_size, 1) and 1 <= local_size <= size):
        raise UsageError(
            f"the variables of {_TITLES[kind]} contradict each other: {names[0]}={rank}, {names[1]}={size}, "
            f"{names[2]}={local_rank}, {names[3]}={local_size}; unset them or start through the launcher"
        )
    return Launcher(kind, rank, size, local_rank, local_size, attempt)


def _number(environ: Mapping[str, str], kind: LauncherKind, name: str) -> int:
    text = environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text!r}, set by {_TITLES[kind]}, is not a number") from None
