"""`ringhold top`: the members of a running job and what they do, again and again, until Ctrl-C."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from collectives.errors import CoordinatorUnreachable, UsageError
from collectives.membership.wire import load_token
from collectives.options import Options
from launch import attach, console
from launch.display import print_table
from launch.vitals import HEADINGS, Vitals, Watch

_LESS = ("lane", "rank", "waits for", "phase", "a second", "heard")
"""Columns that a narrow terminal goes without, in this order."""
_COLOURS = {"member": "green", "disconnected": "red", "waiting to be admitted": "yellow"}


@click.command("top")
@click.argument("coordinator", required=False, metavar="[HOST:PORT]")
@click.option("--run", "run_name", default="default", show_default=True, help="Name of the run.")
@click.option("--every", type=console.Finite(0.05), default=0.5, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once (twice, for the rates) and print a table.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a look instead.")
def command(coordinator: str | None, run_name: str, every: float, once: bool, as_json: bool) -> None:
    """Show what the members of a running job do: state, last operation, rate, and when they were last heard.

    It asks the coordinator at HOST:PORT (default: RINGHOLD_COORDINATOR), which needs the job's token (RINGHOLD_TOKEN or
    RINGHOLD_TOKEN_FILE), and changes nothing. A coordinator that is away is waited for as long as members wait for it.
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
        if as_json:
            print(json.dumps(vitals.to_json()))
        else:
            _print(vitals)
        return
    looks = _looks(vitals, look, every, options.coordinator_timeout)
    if as_json:
        for vitals, _ in looks:
            print(json.dumps(vitals.to_json()), flush=True)
    elif not sys.stdout.isatty():
        for vitals, _ in looks:
            _print(vitals)
    else:
        screen = Console(file=sys.stdout)
        with Live(console=screen, screen=True, auto_refresh=False) as live:
            for vitals, silent in looks:
                live.update(_draw(vitals, silent, screen.width), refresh=True)


def _looks(
    first: Vitals, look: Callable[[], Vitals], every: float, patience: float
) -> Iterator[tuple[Vitals, float | None]]:
    """Look again and again; where the coordinator is silent, what was last seen, and for how many seconds it has been.

    Raises:
        CoordinatorUnreachable: it has been for longer than members wait for it.

    """
    vitals, seen = first, time.monotonic()
    yield vitals, None
    while True:
        time.sleep(every)
        try:
            vitals = look()
        except CoordinatorUnreachable:
            silent = time.monotonic() - seen
            if silent > patience:
                raise
            yield vitals, silent
        else:
            seen = time.monotonic()
            yield vitals, None


def _print(vitals: Vitals) -> None:
    print(vitals.headline())
    print_table(HEADINGS, [row.cells() for row in vitals.rows])
    sys.stdout.flush()


def _draw(vitals: Vitals, silent: float | None, width: int) -> Group:
    rows = [row.cells() for row in vitals.rows]
    shown = _columns(rows, width)
    table = Table(box=None, pad_edge=False)
    for column in shown:
        table.add_column(HEADINGS[column], overflow="ellipsis", no_wrap=True)
    for row in rows:
        cells = [Text(cell) for cell in row]
        cells[2].stylize(_COLOURS.get(row[2], ""))
        table.add_row(*(cells[column] for column in shown))
    head = [Text(vitals.headline(), style="bold")]
    if silent is not None:
        head.append(
            Text(f"the coordinator does not answer, for {silent:.0f} s; this is what it last said", style="red")
        )
    return Group(*head, table)


def _columns(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns that there is room for."""
    shown = list(range(len(HEADINGS)))
    wide = [max(len(cell) for cell in column) for column in zip(HEADINGS, *rows, strict=True)]
    for name in _LESS:
        if sum(wide[column] + 2 for column in shown) <= width + 2:
            break
        shown.remove(HEADINGS.index(name))
    return shown
