"""What a person sees: live progress on a terminal, plain lines elsewhere (both on stderr), and tables on stdout.

A display is an observer of a supervisor's log entries; it decides nothing.
"""

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Self, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.narrate import Narrator
from launch.record import Entry

_PLAIN_WIDTH = 160
_PLAIN_EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""
_LINES = 10


class Display:
    """Plain lines on `stream`; the base of what a terminal shows. Use it as a context manager around the run."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        self.steps = steps
        self.step = 0
        self.loss: float | None = None
        self.began = time.time()
        self._stream = stream
        self._narrator = Narrator()
        self._told_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, entry: Entry) -> None:
        """Take one log entry."""
        if entry["type"] == "progress" and entry["step"] > self.step:
            self.step, self.loss = entry["step"], entry.get("loss", self.loss)
            self.progressed(entry)
        sentence = self._narrator.tell(entry)
        # Once the last step is done everybody leaves, which is news to nobody.
        departing = self.step == self.steps and entry["type"] == "event"
        if sentence is not None and not departing:
            self.happened(f"{max(0.0, entry['time'] - self.began):7.2f} s  {sentence}")

    def progressed(self, entry: Entry) -> None:
        """A step was reached for the first time."""
        if entry["time"] - self._told_at >= _PLAIN_EVERY or self.step == self.steps:
            self._told_at = entry["time"]
            self.happened(f"{entry['time'] - self.began:7.2f} s  {self.status()}")

    def happened(self, line: str) -> None:
        """Something worth a line."""
        print(line, file=self._stream, flush=True)

    def status(self) -> str:
        """Where the run stands, in a few words."""
        return f"step {self.step}/{self.steps}" + (f", loss {self.loss:.4f}" if self.loss is not None else "")


class Quiet(Display):
    """Shows nothing."""

    def happened(self, line: str) -> None:
        """Drop the line."""


class Terminal(Display):
    """A progress bar, the peers, and the last events, redrawn in place."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        super().__init__(steps, stream)
        self._console = Console(file=stream)
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._peers: dict[str, tuple[str, str]] = {}
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, entry: Entry) -> None:
        """Take one log entry."""
        source, kind = entry["source"], entry["type"]
        if source.startswith("peer-"):
            words = {"ready": "joining", "joined": "in", "progress": f"step {entry.get('step')}", "left": "left"}
            words |= {"fired": "dying", "done": "done", "error": "failed"}
            member = f"member {entry['member']}" if "member" in entry else self._peers.get(source, ("", ""))[0]
            if kind in words:
                self._peers[source] = (member, words[kind])
            elif kind == "exit" and entry["code"] != 0:
                self._peers[source] = (member, "dead")
        elif kind == "fault" and entry["what"] == "stop":
            self._peers[entry["peer"]] = (self._peers.get(entry["peer"], ("", ""))[0], "stopped")
        elif kind == "started" and entry["peer"] != "coordinator":
            self._peers[entry["peer"]] = ("", "spare" if entry["spare"] else "starting")
        super().__call__(entry)

    def progressed(self, entry: Entry) -> None:
        """Nothing to do: the bar is redrawn by itself."""

    def happened(self, line: str) -> None:
        """Keep the line among the last ones."""
        self._lines.append(line)

    def _draw(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=self.steps, completed=self.step, width=40), self.status())
        peers = Table.grid(padding=(0, 2))
        colours = {"dead": "red", "dying": "red", "failed": "red", "stopped": "yellow", "done": "green"}
        for name, (member, word) in list(self._peers.items()):
            peers.add_row(Text(name, style="bold"), member, Text(word, style=colours.get(word, "")))
        return Group(
            bar, peers, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in list(self._lines))
        )


def choose(steps: int, quiet: bool, stream: TextIO | None = None) -> Display:
    """Return the display that fits stderr: live on a terminal, lines elsewhere, nothing if `quiet`."""
    stream = stream or sys.stderr
    if quiet:
        return Quiet(steps, stream)
    return Terminal(steps, stream) if stream.isatty() else Display(steps, stream)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; a row has as many cells as there are headings. States are coloured on a terminal."""
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(text) for text in row))
    console.print(table)


def _cell(text: str) -> Text:
    return Text(text, style={"ok": "green", "limited": "yellow", "missing": "red", "FAILED": "bold red"}.get(text, ""))
