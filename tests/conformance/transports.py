"""The transports that the suites of this folder run on."""

TRANSPORTS = ("gloo", "sockets", "shm")
LENDING = ("shm",)
"""Those whose members offer their data with the header: at the point "begin" a peer may have them already."""
