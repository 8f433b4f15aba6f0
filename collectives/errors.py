"""Every error that Ringhold raises on purpose, named by its condition.

A message says what happened, where, and what to do next. Commands map an error to an exit code by `exit_code`:
1 wrong result or failed check, 2 usage, 3 peers lost and not recovered, 4 corrupt or unreadable data, 124 timeout.
"""

from typing import ClassVar


class RingholdError(Exception):
    """Base of all errors below."""

    exit_code: ClassVar[int] = 1


class UsageError(RingholdError):
    """The caller asked for something that cannot be done as asked."""

    exit_code = 2


class OptionError(UsageError):
    """An option is unknown or its value is out of range."""


class Unsupported(UsageError):
    """This machine, library or launcher lacks what was asked for."""


class SpawnFailed(RingholdError):
    """New ranks of an MPI job could not be started; the members go on without them."""


class UnsupportedTensor(UsageError):
    """A tensor has a device, layout or dtype that the operation cannot take."""


class CaptureError(UsageError):
    """A training step cannot be captured as one graph, because its code depends on data or cannot be traced."""


class LaneMisuse(UsageError):
    """A lane is used by two threads at once, or an operation needs it idle and it is not."""


class MemberLost(RingholdError):
    """A member was lost and the operation cannot be run again by the survivors; inputs are untouched.

    `lost` are the ids of the members that went, `survivors` those that remain.
    """

    exit_code = 3

    def __init__(self, message: str, lost: tuple[int, ...] = (), survivors: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.lost = lost
        self.survivors = survivors


class Evicted(RingholdError):
    """This member was taken for dead and is no longer part of the run; it may join again."""

    exit_code = 3


class QuorumLost(RingholdError):
    """Too few members are left for another epoch (options `quorum` and `min_members`)."""

    exit_code = 3


class CoordinatorUnreachable(RingholdError):
    """The coordinator could not be reached within the time allowed."""

    exit_code = 3


class JoinRefused(RingholdError):
    """The coordinator refused this peer: wrong token, another run, another version."""

    exit_code = 2


class DescriptorMismatch(RingholdError):
    """Members called different operations, or the same one with different arguments."""


class CrossedWaits(RingholdError):
    """Members wait for each other in different lanes; none of these operations can ever end."""


class StateDiverged(RingholdError):
    """No state is held by a majority of the members that may vote; `keys` differ."""

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class StateLost(RingholdError):
    """No member is left that holds a state worth giving, or the part of it under `keys`."""

    exit_code = 3

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class CorruptChunk(RingholdError):
    """Bytes do not have the digest by which they are known."""

    exit_code = 4


class CorruptFile(RingholdError):
    """A file is not whole, or its content is not what was written."""

    exit_code = 4


class StorageFailed(RingholdError):
    """A file or an object store did not do what was asked: nothing there, no permission, no space, no connection."""

    exit_code = 4


class NoCheckpoint(StorageFailed):
    """There is no checkpoint, or not the step of it, where one was looked for."""


class UnknownFormat(RingholdError):
    """A checkpoint is of no format that can be read here, or of a newer version of one."""

    exit_code = 4


class LayoutMismatch(RingholdError):
    """Tensors are not where or what a layout or a checkpoint says: missing, unexpected, of another shape or dtype.

    `missing`, `unexpected` and `mismatched` are their names.
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched


class JournalError(RingholdError):
    """The coordinator's journal is missing, locked, corrupt, or older than what a member has seen."""

    exit_code = 4


class ScheduleError(RingholdError):
    """A schedule does not do what its kind promises, or leaves the result to timing."""


class UnsoundSignature(RingholdError):
    """A signature of an operation gives another result than the operation itself."""


class ProtocolError(RingholdError):
    """The other end of a connection broke the protocol; the connection is closed."""


class OperationTimeout(RingholdError):
    """An operation did not end in time."""

    exit_code = 124


class TransportLost(RingholdError):
    """Internal: an attempt cannot go on, because a link failed or the epoch was fenced.

    `peer` is the rank at the other end of the failed link, or None where the attempt was aborted from this side.
    Never reaches the caller of a collective: the verdict of the membership does.
    """

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer
