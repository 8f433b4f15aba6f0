"""`ringhold top`: the members of a running job and what they do, again and again, until Ctrl-C."""

import json
import os
import sys
import time

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from collectives.errors import UsageError
from collectives.membership.wire import load_token
from collectives.options import Options
from launch import attach, console
from launch.display import print_table
from launch.vitals import HEADINGS, Vitals, Watch

_COLOURS = {"member": "green", "disconnected": "red", "waiting to be admitted": "yellow"}


@click.command("top")
@click.argument("coordinator", required=False, metavar="[HOST:PORT]")
@click.option("--run", "run_name", default="default", show_default=True, help="Name of the run.")
@click.option("--every", type=click.FloatRange(0.05), default=0.5, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once (twice, for the rates) and print a table.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a look instead.")
def command(coordinator: str | None, run_name: str, every: float, once: bool, as_json: bool) -> None:
    """Show what the members of a running job do: state, last operation, rate, and when they were last heard.

    It asks the coordinator at HOST:PORT (default: RINGHOLD_COORDINATOR), which needs the job's token (RINGHOLD_TOKEN or
    RINGHOLD_TOKEN_FILE), and changes nothing.
    """
    address = coordinator or os.environ.get("RINGHOLD_COORDINATOR", "")
    if not address:
        raise UsageError("name the coordinator: ringhold top HOST:PORT, or set RINGHOLD_COORDINATOR")
    host, port = console.split_address(address, "HOST:PORT")
    token, options, watch = load_token(), Options.resolve(), Watch()

    def look() -> Vitals:
        return watch.look(attach.status(host, port, token, run_name, options))

    vitals = look()
    if once:
        time.sleep(every)
        vitals = look()
    if once and not as_json:
        print(vitals.headline())
        print_table(HEADINGS, [row.cells() for row in vitals.rows])
    elif as_json:
        print(json.dumps(vitals.to_json()), flush=True)
        while not once:
            time.sleep(every)
            print(json.dumps(look().to_json()), flush=True)
    else:
        screen = Console(file=sys.stdout)
        with Live(_draw(vitals), console=screen, screen=screen.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(_draw(vitals), refresh=True)
                time.sleep(every)
                vitals = look()


def _draw(vitals: Vitals) -> Group:
    table = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for row in vitals.rows:
        cells = [Text(cell) for cell in row.cells()]
        cells[2].stylize(_COLOURS.get(row.state, ""))
        table.add_row(*cells)
    return Group(Text(vitals.headline(), style="bold"), table)
