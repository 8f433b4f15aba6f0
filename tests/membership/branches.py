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
    """Filled in by `look`. A branch is a jump from one line to another: both ways of a condition, each case."""

    taken: list[str] = field(default_factory=list)
    never: list[str] = field(default_factory=list)
    """As `file:line function -> line`; a line that no history reached is `file:line function`."""
    _watcher: coverage.Coverage | None = None

    def start(self) -> None:
        """Watch this thread from now on."""
        self._watcher = coverage.Coverage(branch=True, data_file=None, config_file=False, include=MACHINES)
        self._watcher.start()

    def look(self) -> None:
        """Tell what was taken up to now; go on only if something was not: to watch takes about as long as to play."""
        if self._watcher is not None:
            self._watcher.stop()
            self._tell(self._watcher)
            assert self.taken, "something else watches this thread already"
            if self.never:
                self._watcher.start()
            else:
                self._watcher = None

    def stop(self) -> None:
        """Watch no longer."""
        self.look()
        if self._watcher is not None:
            self._watcher.stop()

    def _tell(self, watcher: coverage.Coverage) -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "branches.json"
            watcher.json_report(outfile=str(out))
            files = json.loads(out.read_text())["files"]
        self.taken, self.never = [], []
        for path, told in sorted(files.items()):
            for function, rows in told["functions"].items():
                if function:  # else the lines of the module itself, which ran when it was imported
                    where = Path(path).name
                    self.taken += [f"{where}:{a} {function} -> {_place(b)}" for a, b in rows["executed_branches"]]
                    self.never += [f"{where}:{a} {function} -> {_place(b)}" for a, b in rows["missing_branches"]]
                    self.never += [f"{where}:{a} {function}" for a in rows["missing_lines"]]


@contextmanager
def watch() -> Iterator[Branches]:
    """Watch what runs inside, in this thread."""
    branches = Branches()
    branches.start()
    try:
        yield branches
    finally:
        branches.stop()


def _place(line: int) -> str:
    return str(line) if line > 0 else "its end"
