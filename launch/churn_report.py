"""What a churn run came to: figures for machines and people, and whether it failed. Used by `launch.churn`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import load_state
from checkpoint.store import Store
from checkpoint.verify import verify
from collectives.errors import RingholdError
from collectives.state import state_hash
from launch.churn_audit import Audit
from launch.churn_lab import HANG_SECONDS, Lab
from launch.churn_plan import Kind
from launch.churn_strike import Strike
from launch.display import print_table
from launch.figures import spread

STAGES = ("detected", "ready", "good")
NAMES = {"detected": "detect", "ready": "re-form", "good": "first good operation"}
_SHOWN = 8
"""Complaints of each sort that are printed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for, as it is reported."""

    peers: str
    seconds: float
    seed: int
    transport: str
    faults: tuple[Kind, ...]
    ops: tuple[str, ...]
    replay: str
    """The command that runs it again."""
    left_out: dict[str, str]
    """Faults that cannot be had here, and why."""


def summary(lab: Lab, settings: Settings, seconds: float, folder: Path) -> dict[str, Any]:
    """Return the figures; times in milliseconds, from the fault to the last survivor."""
    audit = lab.audit
    losses = [strike for strike in audit.strikes if strike.kind in ("kill", "stop", "leave", "partition")]
    report = {
        "seed": settings.seed,
        "transport": settings.transport,
        "peers": settings.peers,
        "seconds": round(seconds, 1),
        "operations": sum(audit.operations.values()),
        "operations_by_kind": dict(sorted(audit.operations.items())),
        "gib_checked": round(audit.checked_bytes / (1 << 30), 2),
        "run_again": audit.run_again,
        "from_staging": audit.from_staging,
        "member_lost": audit.interrupted,
        "syncs": audit.syncs,
        "checkpoints": len(audit.saved),
        "healed_by_sync": audit.healed_by_sync,
        "faults": {kind: {"planned": lab.planned[kind], "fired": lab.fired[kind]} for kind in settings.faults},
        "aimed": dict(sorted(lab.aimed.items())),
        "inside_an_operation": sum(strike.inside for strike in losses),
        "overlapping": sum(strike.overlapping for strike in losses),
        "left_out": settings.left_out,
        "damage_noticed": _noticed(folder),
        "wrong": len(audit.wrong),
        "hangs": len(lab.hangs),
        "hang_bound": HANG_SECONDS,
        "leaks": len(audit.leaks),
        "false_evictions": len(audit.false_evictions),
        "lent_max": dict(audit.lent),
        "growth_mib_max": max(audit.growth, default=0) >> 20,
        "recoveries": _by_kind(losses),
        "recoveries_alone": _by_kind([strike for strike in losses if not strike.overlapping]),
        "replay": settings.replay,
    }
    return {**report, "complaints": complaints(lab, audit)}


def complaints(lab: Lab, audit: Audit) -> list[str]:
    """What the run failed by, in full; empty if it passed."""
    return [*audit.wrong[:100], *lab.hangs, *audit.leaks[:100]]


def prove_checkpoints(path: Path, saved: dict[int, tuple[int, str]]) -> list[str]:
    """Load every step that a member knows to be there; return what is wrong with them.

    A step that nobody lived to tell of may be there too: then it is whole.
    """
    if not saved and not path.exists():
        return []
    with Store(path) as store:
        there = store.steps()
        try:
            wrong = [f"checkpoint {damage.where}: {damage.what}" for damage in verify(store, there).damages]
        except RingholdError as error:
            wrong = [f"checkpoints: {error}"]
    for step, (peer, state) in saved.items():
        if step not in there:
            wrong.append(f"checkpoint {step}, saved by peer {peer}, is not there")
            continue
        try:
            found = state_hash(load_state(path, step=step))[: len(state)]
        except RingholdError as error:
            found = str(error)
        if found != state:
            wrong.append(f"checkpoint {step}, of which peer {peer} saved {state}: {found}")
    return wrong


def show(report: dict[str, Any], false_evictions: list[str]) -> None:
    """Print tables on stdout."""
    faults = [[kind, str(n["planned"]), str(n["fired"])] for kind, n in report["faults"].items()]
    print_table(("fault", "planned", "fired"), faults)
    for what, label in (("recoveries", "ms"), ("recoveries_alone", "ms, faults by themselves")):
        _show_times(label, report[what])
    plain = ("operations", "gib_checked", "run_again", "from_staging", "member_lost", "syncs", "checkpoints", "seconds")
    print_table(plain, [[str(report[name]) for name in plain]])
    print_table(
        ("wrong", "hangs", "leaks", "false evictions", "damage noticed"),
        [[str(report[name]) for name in ("wrong", "hangs", "leaks", "false_evictions", "damage_noticed")]],
    )
    for text in [*report["complaints"][:_SHOWN], *(f"false eviction: {text}" for text in false_evictions[:_SHOWN])]:
        print(text)


def _show_times(label: str, recoveries: dict[str, Any]) -> None:
    rows = []
    for kind, times in recoveries.items():
        spreads = [times[NAMES[stage]] for stage in STAGES]
        cells = [" / ".join(str(one[what]) for what in ("p50", "p99", "max")) for one in spreads]
        rows.append([kind, str(times[NAMES["good"]]["count"]), *cells])
    heads = [f"{NAMES[stage]} p50 / p99 / max" for stage in STAGES]
    print_table((label, "count", *heads), rows)


def _by_kind(strikes: list[Strike]) -> dict[str, Any]:
    kinds = ("all", *dict.fromkeys(strike.kind for strike in strikes))
    return {kind: _times([strike for strike in strikes if kind in ("all", strike.kind)]) for kind in kinds}


def _times(strikes: list[Strike]) -> dict[str, Any]:
    return {
        NAMES[stage]: spread([1000 * max(times.values()) for strike in strikes if (times := getattr(strike, stage))])
        for stage in STAGES
    }


def _noticed(folder: Path) -> int:
    """Count what the logs of members and coordinator say of checksums that do not fit."""
    said = re.compile(rb"checksum")
    return sum(len(said.findall(log.read_bytes())) for log in folder.glob("*.log"))
