"""Which branches of the two state machines simulated histories took, and which none did."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import coverage

from collectives.membership import coordinator, member

MACHINES = [str(Path(module.__file__ or "")) for module in (coordinator, member)]


@dataclass(slots=True)
class Branches:
    """Filled in when `watch` ends. A branch is a jump from one line to another: both ways of a condition, each case."""

    taken: list[str] = field(default_factory=list)
    never: list[str] = field(default_factory=list)
    """As `file:line function -> line`; a line that no history reached is `file:line function`."""


@contextmanager
def watch() -> Iterator[Branches]:
    """Watch what runs inside, in this thread."""
    branches = Branches()
    watcher = coverage.Coverage(branch=True, data_file=None, config_file=False, include=MACHINES)
    watcher.start()
    try:
        yield branches
    finally:
        watcher.stop()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "branches.json"
        watcher.json_report(outfile=str(out))
        files = json.loads(out.read_text())["files"]
    for path, told in sorted(files.items()):
        for function, rows in told["functions"].items():
            if function:  # else the lines of the module itself, which ran when it was imported
                where = Path(path).name
                branches.taken += [f"{where}:{a} {function} -> {_place(b)}" for a, b in rows["executed_branches"]]
                branches.never += [f"{where}:{a} {function} -> {_place(b)}" for a, b in rows["missing_branches"]]
                branches.never += [f"{where}:{a} {function}" for a in rows["missing_lines"]]
    assert branches.taken, "something else watches this thread already"
    return None


def _place(line: int) -> str:
    return str(line) if line > 0 else "its end"
