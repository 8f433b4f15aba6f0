"""`ringhold doctor`: what works on this machine; with --attach, what the members of a running job are doing."""

import json
import sys
from dataclasses import asdict

import click
import msgspec

from collectives.membership.protocol import Status
from collectives.membership.wire import load_token
from collectives.options import Options
from launch import attach, console, machine
from launch.display import print_table


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--attach", "address", metavar="HOST:PORT", help="Ask the coordinator of a running job instead.")
@click.option("--run", "run_name", default="default", show_default=True, help="With --attach: the name of the run.")
def command(as_json: bool, address: str | None, run_name: str) -> int:
    """Check what works on this machine and what follows from it.

    Exits with 0 unless the core (Python, torch, gloo, loopback) is broken. With --attach it needs the job's token
    (RINGHOLD_TOKEN or RINGHOLD_TOKEN_FILE), and prints each member's lane, last operation and whom it waits for.
    """
    if address is None:
        return _examine(as_json)
    host, port = console.split_address(address, "--attach")
    status = attach.status(host, port, load_token(), run_name, Options.resolve())
    if as_json:
        print(json.dumps(msgspec.to_builtins(status)))
    else:
        _print_status(status)
    return 0


def _examine(as_json: bool) -> int:
    findings = machine.examine()
    broken = [finding.name for finding in findings if finding.core and finding.status == "missing"]
    if as_json:
        print(json.dumps({"ok": not broken, "checks": [asdict(finding) for finding in findings]}))
    else:
        rows = [(finding.name, finding.status, finding.found, finding.follows) for finding in findings]
        print_table(("check", "status", "found", "what follows"), rows)
        print(
            f"broken: {', '.join(broken)}; nothing runs without" if broken else "ready: peers can train on this machine"
        )
    return 1 if broken else 0


def _print_status(status: Status) -> None:
    change = f", changing to epoch {status.change}" if status.change else ""
    print(f"run {status.run!r}: epoch {status.epoch}{change}, {len(status.members)} members, {status.waiting} waiting")
    rows = []
    for member in status.members:
        rank = str(member.rank) if member.rank >= 0 else "-"
        who = (str(member.member), rank, member.state, f"{member.age:.1f} s ago")
        for lane in member.lanes:
            waits = f"member {lane.waiting_for}" if lane.waiting_for else "-"
            rows.append((*who, lane.lane, f"{lane.kind} {lane.seq}", f"{lane.phase} for {lane.seconds:.1f} s", waits))
        if not member.lanes:
            rows.append((*who, "-", "-", "-", "-"))
    print_table(("member", "rank", "state", "heard", "lane", "operation", "phase", "waits for"), rows)


if __name__ == "__main__":
    sys.exit(console.run(command))
