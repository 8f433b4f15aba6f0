"""What the coordinator's state machine wants done; `server.py` does it, in order."""

import msgspec

from collectives.membership.protocol import FromCoordinator, Record

Connection = int
"""Names one connection; the driver never reuses a number."""


class Persist(msgspec.Struct, frozen=True):
    """Append to the journal and fsync before going on."""

    record: Record


class Send(msgspec.Struct, frozen=True):
    """Send to one peer."""

    connection: Connection
    message: FromCoordinator


class Close(msgspec.Struct, frozen=True):
    """Close a connection after what was sent on it."""

    connection: Connection


class Stop(msgspec.Struct, frozen=True):
    """End the coordinator: going on could do harm."""

    reason: str


Action = Persist | Send | Close | Stop
