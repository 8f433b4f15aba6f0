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
from launch.vitals import HEADINGS, Watch


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
    vitals = Watch().look(status)
    print(vitals.headline())
    print_table(HEADINGS[:-1], [row.cells()[:-1] for row in vitals.rows])


if __name__ == "__main__":
    sys.exit(console.run(command))
