"""`ringhold trace merge`: the traces of all members in one file, on one clock; see `collectives.trace`."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from collectives.errors import CorruptFile, UsageError
from launch import console

Event = dict[str, Any]
_CLOCK = "clock"


@click.group("trace")
def command() -> None:
    """Work with the traces that members write where RINGHOLD_TRACE names a folder."""


@command.command("merge")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
def merge_command(folder: Path, output: Path) -> int:
    """Join the traces of FOLDER in one file, for chrome://tracing or https://ui.perfetto.dev.

    Members of one host are aligned by its monotonic clock, those of others by their wall clocks. Traces of members that
    were killed are read as far as they go.
    """
    paths = sorted(path for path in folder.glob("*.json") if path.resolve() != output.resolve())
    if not paths:
        raise UsageError(f"no traces in {folder}; set RINGHOLD_TRACE={folder} for the members of a run first")
    events = merge([read(path) for path in paths])
    try:
        output.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}; name another file with --output") from None
    print(f"{len(events)} events of {len(paths)} members in {output}", file=sys.stderr)
    return 0


def read(path: Path) -> list[Event]:
    """Return the events of one member's trace; a last line that was cut off by its end is left out.

    Raises:
        CorruptFile: it is no trace.

    """
    lines = path.read_text().splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines[1:], start=2):
        if line == "{}]":
            break
        try:
            events.append(json.loads(line.rstrip(",")))
        except ValueError:
            if number < len(lines):
                raise CorruptFile(f"{path}, line {number}: no trace event") from None
    if lines[:1] != ["["] or not any(event["name"] == _CLOCK for event in events):
        raise CorruptFile(f"{path} is no trace of a member; move it out of the folder")
    return events


def merge(traces: list[list[Event]]) -> list[Event]:
    """Put the members' events on one clock that begins at 0, and give each member of each run a process of its own."""
    first = _clock(traces[0])
    runs = sorted({_clock(trace)["run"] for trace in traces})
    merged: list[Event] = []
    for trace in traces:
        clock = _clock(trace)
        shift = 0.0
        if clock["boot"] != first["boot"]:
            shift = (clock["wall_us"] - clock["monotonic_us"]) - (first["wall_us"] - first["monotonic_us"])
        place = runs.index(clock["run"])
        for event in trace:
            moved = {**event, "pid": place * 1000 + event["pid"]}
            if "ts" in event:
                moved["ts"] = event["ts"] + shift
            if "id" in event:
                moved["id"] = f"{clock['run']} {event['id']}"
            merged.append(moved)
    begin = min((event["ts"] for event in merged if "ts" in event), default=0.0)
    for event in merged:
        if "ts" in event:
            event["ts"] = round(event["ts"] - begin, 3)
    return merged


def _clock(trace: list[Event]) -> Event:
    about: Event = next(event["args"] for event in trace if event["name"] == _CLOCK)
    return about


if __name__ == "__main__":
    sys.exit(console.run(command))
