"""The messages between coordinator and members, and how they are framed.

Every message is a frozen struct with a tag; a frame that is too long, unknown or has other fields is a `ProtocolError`
and closes its connection. The state machines in `coordinator.py` and `member.py` exchange these values; `wire.py`
carries them. Epoch numbers, member ids and lane sequence numbers are never reused within a run.
"""

from typing import Annotated, Literal

import msgspec

from collectives.errors import ProtocolError

VERSION = 1
"""Peers of different versions refuse each other."""

MAX_FRAME = 1 << 20
"""Bytes of the longest control frame after the handshake (a thousand members fit)."""

NONCE_BYTES = 16

Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Group = tuple[Count, ...]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of everything that crosses the control channel or is written to the journal."""


# --- handshake -------------------------------------------------------------------------------------------------------


class Challenge(Message, frozen=True):
    """Coordinator's first word: its version and a fresh nonce."""

    version: Count
    nonce: Nonce


class Proof(Message, frozen=True):
    """Peer's answer: what it wants, its own nonce and an HMAC over both nonces with the run's token."""

    version: Count
    run: Name
    nonce: Nonce
    mac: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Granted(Message, frozen=True):
    """Coordinator's HMAC over the same nonces: it holds the token too."""

    mac: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Refused(Message, frozen=True):
    """The connection will be closed, for this reason."""

    reason: Text


# --- member to coordinator -------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """A new peer asks for a place; `nonce` tells it from any other that might get the same address."""

    nonce: Nonce
    host: Name
    port: Port
    transport: Name


class Resume(Message, frozen=True):
    """A member returns after its connection or the coordinator was gone.

    `secret` is what the member's public nonce is the digest of, so nobody else can resume in its name.
    """

    member: Count
    secret: Nonce
    epoch: Count
    promised: Count


class LaneStatus(Message, frozen=True):
    """What one lane of a member is doing, for stall decisions and for `ringhold doctor --attach`.

    `seq` is the last operation that was entered; `phase` is "idle" when none is under way. `group` are the members of
    the lane's sub-group; empty: all members.
    """

    lane: Name
    seq: Count
    kind: Text
    phase: Text
    waiting_for: Count
    seconds: float
    group: Group = ()


class Beat(Message, frozen=True):
    """A heartbeat."""

    lanes: list[LaneStatus]


class LaneReport(Message, frozen=True):
    """Rule R3: what a fenced member says of one lane.

    `complete` is the highest complete sequence number and `complete_epoch` the attempt that completed it; `staged`
    with `staged_epoch` the operation that is staged and not yet complete (0, 0: none); `entered` the last one entered;
    `left` the last one that was left, by result or by error; `group` the members of its sub-group (empty: all).
    """

    complete: Count
    complete_epoch: Count
    staged: Count
    staged_epoch: Count
    entered: Count
    left: Count
    group: Group = ()


class Report(Message, frozen=True):
    """Answer to `Prepare`: this member has fenced every epoch before `epoch`."""

    epoch: Count
    lanes: dict[Name, LaneReport]


class LinkDown(Message, frozen=True):
    """The link to `peer` (a member id; the sender's own id where it cannot tell) failed in `epoch`."""

    epoch: Count
    peer: Count


class Stalled(Message, frozen=True):
    """An operation did not end within the operation timeout."""

    epoch: Count
    lane: Name
    seq: Count


class Differs(Message, frozen=True):
    """A neighbour's header differs from ours: `theirs` came from member `other`.

    `lost` is set where only the views differ: one end issued the operation before a loss and the other after.
    """

    epoch: Count
    lane: Name
    seq: Count
    mine: Text
    theirs: Text
    other: Count
    lost: bool


class Admit(Message, frozen=True):
    """This member is at a safe point of `epoch` and lets waiting peers in."""

    epoch: Count


class Leave(Message, frozen=True):
    """A crash with notice."""

    reason: Text


class Inspect(Message, frozen=True):
    """Ask for a `Status`; the sender is no peer."""


# --- coordinator to member -------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The joiner's id; it waits for an epoch that includes it."""

    member: Count


class Waiting(Message, frozen=True):
    """How many peers wait to be admitted."""

    count: Count


class Alive(Message, frozen=True):
    """Answer to a heartbeat."""


class Prepare(Message, frozen=True):
    """Rule R3: fence everything before `epoch` and report."""

    epoch: Count
    members: list[Count]


class MemberInfo(Message, frozen=True):
    """One member of an epoch, in rank order. `host` and `port` are where its links listen."""

    member: Count
    nonce: Nonce
    host: Name
    port: Port
    founder: bool


class LaneFrontier(Message, frozen=True):
    """Where a lane stands at the start of an epoch.

    Operations up to `complete` are complete everywhere (the last one by the attempt of `complete_epoch`);
    `entered` is where joiners start to count; `group` are the members of its sub-group (empty: all).
    """

    complete: Count
    complete_epoch: Count
    entered: Count
    group: Group = ()


VerdictKind = Literal["mismatch", "crossed", "lost", "disputed"]


class Verdict(Message, frozen=True):
    """Operation (lane, seq) ends with this error on every member; if "disputed", all that follow it do too."""

    lane: Name
    seq: Count
    error: VerdictKind
    message: Text


class Decision(Message, frozen=True):
    """An epoch: journaled, then announced to each of its members, with the lanes that concern it.

    `admitted` is set when every survivor stood at a safe point, so that joiners could be let in. `ended` marks a run
    whose last member left with notice: the next peers found it anew.
    """

    epoch: Count
    nonce: Nonce
    members: list[MemberInfo]
    lost: list[Count]
    joined: list[Count]
    lanes: dict[Name, LaneFrontier]
    verdicts: list[Verdict]
    admitted: bool
    next_member: Count
    transport: Text
    ended: bool = False


class Evict(Message, frozen=True):
    """The receiver is no member (any more). `kind` names the error that it raises."""

    kind: Literal["evicted", "quorum", "left"]
    reason: Text


class MemberStatus(Message, frozen=True):
    """One row of `Status`; `age` is seconds since the member was last heard."""

    member: Count
    rank: int
    state: Text
    age: float
    lanes: list[LaneStatus]


class Status(Message, frozen=True):
    """What the coordinator knows, for people."""

    run: Name
    epoch: Count
    change: Count
    waiting: Count
    members: list[MemberStatus]


# --- journal ---------------------------------------------------------------------------------------------------------


class Opened(Message, frozen=True):
    """First record of a journal: whose it is."""

    run: Name
    version: Count


class Prepared(Message, frozen=True):
    """Number `epoch` is used up, whatever becomes of the change."""

    epoch: Count


FromPeer = Proof | Join | Resume | Beat | Report | LinkDown | Stalled | Differs | Admit | Leave | Inspect
FromCoordinator = Challenge | Granted | Refused | Welcome | Waiting | Alive | Prepare | Decision | Evict | Status
Record = Opened | Prepared | Decision

_from_peer: msgspec.msgpack.Decoder[FromPeer] = msgspec.msgpack.Decoder(FromPeer)
_from_coordinator: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Bytes of one message."""
    return _encoder.encode(message)


def decode_from_peer(data: bytes) -> FromPeer:
    """Parse what a peer sent. Raises `ProtocolError` on anything but a valid message."""
    try:
        return _from_peer.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed frame from a peer: {error}") from None


def decode_from_coordinator(data: bytes) -> FromCoordinator:
    """Parse what the coordinator sent. Raises `ProtocolError` on anything but a valid message."""
    try:
        return _from_coordinator.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed frame from the coordinator: {error}") from None
