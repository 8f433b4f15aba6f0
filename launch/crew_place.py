"""The process that MPI's launcher starts for a peer of the churn lab: it holds the peer's place among the ranks.

    RINGHOLD_CREW=NAME python -I -S launch/crew_place.py [PEER]

The rank itself is forked by the crew (`crew_ranks`), which has torch imported already, and gets the environment of this
process, by which a process is a rank; `launch.train` starts peers under a launcher in the same way. This process tells
the crew what that environment is, waits, and ends as its rank has ended: by the same signal, or with the same code. It
imports nothing of ours: many are started, and each must be there at once.
"""

import ctypes
import json
import os
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Offer the place, and end as the crew says."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    environ = dict(os.environ)
    peer = sys.argv[1] if len(sys.argv) > 1 else environ["OMPI_COMM_WORLD_RANK"]
    with socket.socket(socket.AF_UNIX) as line:
        line.connect("\0" + environ["RINGHOLD_CREW"])  # fails if the crew is gone
        with line.makefile("rwb") as file:
            file.write(json.dumps({"peer": int(peer), "environ": environ}).encode() + b"\n")
            file.flush()
            code = int(file.readline() or 0)  # nothing: the crew is gone, and its peers with it
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
