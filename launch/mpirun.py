"""The launcher of MPI: where it is, and what Open MPI's is told. Used by `bench_host` and `crew_ranks`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from collectives.errors import UsageError

OPEN_MPI = ("--oversubscribe", "--bind-to", "none")
"""More ranks than cores are the rule on the machines that this is for."""
OPEN_MPI_ENVIRON = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
"""A rank that waits must give way: two that were woken on one core would otherwise wait there for each other's time
slice. All of them are on this host, and nothing of theirs shall listen elsewhere. And containers run as root."""


def find() -> tuple[str, str, bool]:
    """Return the launcher's path, the PATH that its ranks need, and whether it is Open MPI's.

    Raises:
        UsageError: there is none.

    """
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside, os.environ.get("PATH", "")])
    mpirun = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if mpirun is None:
        raise UsageError('MPI needs mpirun or mpiexec on PATH; install one: pip install "ringhold[mpi]"')
    words = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    return mpirun, path, "Open MPI" in words
