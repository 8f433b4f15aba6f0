"""What the coordinator's state machine wants done; `server.py` does it, in order."""

from dataclasses import dataclass

from collectives.membership.protocol import FromCoordinator, Record

Connection = int
"""Names one connection; the driver never reuses a number."""


@dataclass(frozen=True, slots=True)
class Persist:
    """Append to the journal and fsync before going on."""

    record: Record


@dataclass(frozen=True, slots=True)
class Send:
    """Send to one peer."""

    connection: Connection
    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class Close:
    """Close a connection after what was sent on it."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Stop:
    """End the coordinator: going on could do harm."""

    reason: str


Action = Persist | Send | Close | Stop
