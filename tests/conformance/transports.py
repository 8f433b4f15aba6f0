"""The transports of these suites, and how many members they have. RINGHOLD_LONG=1: all of them everywhere."""

import os

LONG = os.environ.get("RINGHOLD_LONG") == "1"
TRANSPORTS = ("gloo", "sockets", "shm")
LENDING = ("shm",)
"""Those whose members offer their data with the header: at the point "begin" a peer may have them already."""

_ALL = (1, 2, 3, 4, 5, 8)
_SOME = {"gloo": (1, 2, 3, 5), "sockets": (2, 4), "shm": (1, 2, 3, 4), "openmpi": (3,), "mpich": (2,)}
WORLDS = dict.fromkeys(_SOME, _ALL) if LONG else _SOME
"""How many members the results of all operations are checked with, by transport or library of MPI."""
