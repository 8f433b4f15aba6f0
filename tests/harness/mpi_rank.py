"""A rank of an MPI job of the harness: connects to the test (`mpi.MpiCluster`) and runs the program it is given."""

import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def main(where: str) -> NoReturn:
    """Be rank number so and so of the job, of which the test listens at the socket `where`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = next(os.environ[name] for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in os.environ)
    log = Path(where).parent / f"rank-{int(rank):03}.log"
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)

    import torch

    from tests.harness.peer import serve

    torch.set_num_threads(1)
    line = socket.socket(socket.AF_UNIX)
    line.connect(where)
    line.sendall(json.dumps({"name": log.stem, "pid": os.getpid(), "log": str(log)}).encode() + b"\n")
    with line.makefile("rb", buffering=0) as file:
        order = json.loads(file.readline())
    serve(order["program"], log.stem, order["setting"], order["given"], line, finalize=True)


if __name__ == "__main__":
    main(sys.argv[1])
