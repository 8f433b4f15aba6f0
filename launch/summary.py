"""The end of a run: proofs, exit code, what is printed and kept of it. Called by `launch.train` and `launch.demo`."""

import json
import sys
from dataclasses import asdict
from typing import Any

from launch import display, verdict
from launch.record import Entry, RunLog, RunRecord, entry, read_log
from launch.session import Outcome, Request
from launch.timeline import Recovery, recoveries


def conclude(outcome: Outcome, request: Request, *, as_json: bool, reference: bool, control: bool) -> int:
    """Judge the run, print the summary on stdout (rank 0), keep it as OUT/summary.json, and return the exit code."""
    record = outcome.record
    checks = verdict.judge(record)
    proven = verdict.Proofs(())
    if verdict.finishers(record.peers) and not record.signal:
        from launch import proofs  # imports torch: who interrupts a run does not wait for it

        proven = proofs.prove(
            request.config, against_reference=reference, control=control, tell=lambda line: _tell(line, request.quiet)
        )
    checks += proven.checks
    code = verdict.exit_code(record, checks)
    if outcome.rank != 0:
        return code
    log = _logs(request)
    recovered = recoveries(record.faults, log)
    summary = _summary(request, record, checks, proven, recovered, log, code)
    (request.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _log_verdict(request, checks, proven, code)
    if as_json:
        print(json.dumps(summary))
    else:
        _print(summary, record, recovered, checks)
    return code


def _log_verdict(request: Request, checks: list[verdict.Check], proven: verdict.Proofs, code: int) -> None:
    """The log ends with what came of the run: `launch.report` needs no other file."""
    log = RunLog(request.out / "run.jsonl")
    told = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks]
    losses = {"first_step": proven.first_step, "losses": proven.losses, "reference": proven.reference}
    log(entry("supervisor", "verdict", passed=code == 0, checks=told, **losses))
    log.close()


def _logs(request: Request) -> list[Entry]:
    """Return the events of all supervisors of the run, by time."""
    entries = [entry for path in request.out.glob("run*.jsonl") for entry in read_log(path)]
    return sorted(entries, key=lambda entry: float(entry["time"]))


def _summary(
    request: Request,
    record: RunRecord,
    checks: list[verdict.Check],
    proven: verdict.Proofs,
    recovered: list[Recovery],
    log: list[Entry],
    code: int,
) -> dict[str, Any]:
    finishers = verdict.finishers(record.peers)
    return {
        "ok": code == 0,
        "exit_code": code,
        "out": str(request.out),
        "seconds": round(log[-1]["time"] - log[0]["time"], 3) if log else 0.0,
        "steps": max((peer.step for peer in record.peers), default=0),
        "loss": proven.loss,
        "reference_loss": proven.reference_loss,
        "epochs": proven.epochs,
        "repeated_steps": proven.repeated,
        "hashes": {peer.name: (peer.result or {}).get("hash") for peer in finishers},
        "text": next((entry["text"] for entry in log if entry["type"] == "sample"), ""),
        "faults": [recovery.to_json() for recovery in recovered],
        "planned_faults": [str(fault.planned) for fault in record.faults],
        "peers": [asdict(peer) for peer in record.peers],
        "checks": [asdict(check) for check in checks],
    }


def _print(summary: dict[str, Any], record: RunRecord, recovered: list[Recovery], checks: list[verdict.Check]) -> None:
    if recovered:
        print("\nFaults; detection, new epoch, first good operation there and return in seconds after each")
        headings = ("at", "fault", "peer", "detected", "re-formed", "first op", "back", "epoch")
        display.print_table(headings, [_row(recovery) for recovery in recovered])
        for recovery in recovered:
            if recovery.detail:
                print(f"  {recovery.fault} of {recovery.peer}: {recovery.detail}")
    for peer in record.peers:
        if peer.tail:
            print(f"\nThe last words of {peer.name}:\n{peer.tail}")
    display.print_table(("check", "result", ""), [(c.name, "ok" if c.ok else "FAILED", c.detail) for c in checks])
    if summary["text"]:
        print(f"The trained model writes: {summary['text'][:240]!r}\n")
    loss = f", loss {summary['loss']:.4f}" if summary["loss"] is not None else ""
    state = "PASSED" if summary["ok"] else f"FAILED (exit code {summary['exit_code']})"
    print(f"{state}: {summary['steps']} steps in {summary['seconds']:.1f} s{loss}. Everything is in {summary['out']}")


def _row(recovery: Recovery) -> tuple[str, ...]:
    times = (recovery.detected, recovery.reformed, recovery.recovered, recovery.back)
    return (
        f"{recovery.at:.2f} s",
        recovery.fault,
        recovery.peer if recovery.peer != recovery.fault else "-",
        *("-" if value is None else f"{value:.3f}" for value in times),
        "-" if recovery.epoch is None else str(recovery.epoch),
    )


def _tell(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)
