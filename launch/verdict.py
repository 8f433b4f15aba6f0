"""Judging a run from its record: what had to hold, whether it held, and the exit code that follows.

Pure functions over `launch.record`; the proofs that read the results from disk are in `launch.proofs`.
"""

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from collectives.errors import MemberLost, OperationTimeout, RingholdError
from launch.narrate import ending
from launch.record import FaultRecord, PeerRecord, RunRecord


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that had to hold. `exit_code` is what a failure of it makes of the command's."""

    name: str
    ok: bool
    detail: str
    exit_code: int = RingholdError.exit_code


@dataclass(frozen=True, slots=True)
class Proofs:
    """What `launch.proofs` found. `loss` and `reference_loss` are of the last step."""

    checks: tuple[Check, ...]
    loss: float | None = None
    reference_loss: float | None = None
    repeated: int = 0
    """Attempts of steps that lost a member and were repeated."""
    epochs: int = 0
    """Membership epochs in which steps were committed."""
    first_step: int = 0
    losses: tuple[float, ...] = ()
    """Of every step from `first_step` on."""
    reference: tuple[float, ...] = ()
    """Of the fault-free run, where there is one."""


def judge(record: RunRecord) -> list[Check]:
    """Return the checks of the run itself: it ended, its peers did as planned, its faults struck, the states agree.

    Of a run that was broken off there is nothing more to say than that.
    """
    if record.signal or record.coordinator_error is not None:
        return [_ended(record)]
    return [_ended(record), _peers(record), _faults(record.faults), _agreement(record.peers)]


def exit_code(record: RunRecord, checks: Iterable[Check]) -> int:
    """Return the command's exit code: 0 if every check holds, else that of the first that fails."""
    if record.signal:
        return 128 + record.signal
    return next((check.exit_code for check in checks if not check.ok), 0)


def finishers(peers: Iterable[PeerRecord]) -> list[PeerRecord]:
    """Return the peers that worked to the end of the run and delivered their result."""
    return [peer for peer in peers if peer.code == 0 and peer.result is not None]


def _ended(record: RunRecord) -> Check:
    if record.signal:
        return Check("run", False, f"ended by {signal.Signals(record.signal).name}", 128 + record.signal)
    if record.coordinator_error is not None:
        return Check("run", False, record.coordinator_error["message"], record.coordinator_error["exit_code"])
    if record.timeout:
        return Check("run", False, record.timeout, OperationTimeout.exit_code)
    steps = max((peer.step for peer in record.peers), default=0)
    detail = f"came to its end at step {steps}"
    if record.coordinator_deaths:
        detail += f"; the coordinator was started again {record.coordinator_deaths} times without a fault of ours"
    return Check(
        "run",
        bool(finishers(record.peers)),
        detail if finishers(record.peers) else "nobody came to the end",
        _worst(record.peers),
    )


def _faults(faults: Sequence[FaultRecord]) -> Check:
    missing = [reason for fault in faults if (reason := _shortfall(fault))]
    if missing:
        return Check("faults", False, "; ".join(missing))
    kinds = [fault.planned.kind for fault in faults]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return Check("faults", True, f"all {len(faults)} planned faults struck ({counts})" if faults else "none planned")


def _shortfall(fault: FaultRecord) -> str:
    """Say what is missing for a fault to count as struck and, where that is part of it, overcome."""
    if fault.injected is None:
        return f"{fault.planned} never came: the run was over before its step, or its victim was away"
    if fault.fired is None:
        late = " before the run was over; try more steps, or a --pace" if fault.planned.kind == "join" else ""
        return f"{fault.planned} was sent to {fault.peer}, but nothing happened{late}"
    if fault.ended is None and fault.planned.kind == "stop":
        return f"{fault.peer} did not come back after {fault.planned}; try more steps, or a --pace"
    if fault.ended is None and fault.planned.kind == "coordinator":
        return f"the coordinator did not come back after {fault.planned}"
    return ""


def _peers(record: RunRecord) -> Check:
    spares = {fault.planned.slot for fault in record.faults if fault.injected is None and fault.planned.kind == "join"}
    lost: list[PeerRecord] = []
    replaced: list[PeerRecord] = []
    for peer in record.peers:
        if not _fine(peer) and not (peer.slot in spares and not peer.members):
            later = any(other.slot == peer.slot and _fine(other) for other in record.peers if other is not peer)
            (replaced if later else lost).append(peer)
    if lost:
        return Check("peers", False, "; ".join(_story(peer) for peer in lost), _worst(lost))
    done = finishers(record.peers)
    detail = f"{len(done)} worked to the end"
    killed = [peer.name for peer in record.peers if peer.planned_end == "kill"]
    detail += f", {len(killed)} killed as planned" if killed else ""
    detail += f", {len(replaced)} lost and replaced" if replaced else ""
    return Check("peers", True, detail)


def _fine(peer: PeerRecord) -> bool:
    if peer.planned_end == "kill":
        return peer.code == -signal.SIGKILL
    if peer.planned_end == "late":
        return peer.error is None
    return peer.code == 0 and (peer.result is not None or peer.planned_end == "leave")


def _story(peer: PeerRecord) -> str:
    end = f"{peer.name} ended {ending(peer.code if peer.code is not None else 0)} at step {peer.step}"
    if peer.error is not None:
        return f"{end}: {peer.error['error']}: {peer.error['message']}"
    return f"{end} and was not replaced (--restart does that)" if (peer.code or 0) < 0 else end


def _worst(peers: Sequence[PeerRecord]) -> int:
    """Return the exit code that the ends of peers call for: their own error's where they name one, else lost peers."""
    codes = [peer.error["exit_code"] for peer in peers if peer.error is not None]
    codes += [peer.code for peer in peers if peer.error is None and peer.code is not None and peer.code > 0]
    return max(codes, key=codes.count) if codes else MemberLost.exit_code


def _agreement(peers: Iterable[PeerRecord]) -> Check:
    hashes = {peer.name: str((peer.result or {}).get("hash", "")) for peer in finishers(peers)}
    if not hashes:
        return Check("state", False, "no peer delivered a state")
    if len(set(hashes.values())) > 1:
        return Check("state", False, "states differ: " + ", ".join(f"{name} {h[:12]}" for name, h in hashes.items()))
    digest = next(iter(hashes.values()))
    return Check("state", True, f"{len(hashes)} peers hold the same bits, BLAKE3 {digest[:16]}")
