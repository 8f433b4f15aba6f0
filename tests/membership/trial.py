"""Tries one mutant in a process of its own, forked from a warm one. Called by `mutation.py`.

The parent has imported what a mutant cannot change; the child compiles the mutant in place of its file, which stays as
it is on the disk, imports what depends on it, and ends at the first thing that notices.
"""

import importlib.machinery
import importlib.util
import inspect
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

PACKAGE = "collectives.membership"
FILES = ("coordinator", "member", "decisions", "frontiers", "claims", "stalls", "roster")
FOLDER = Path(__file__).resolve().parents[2] / "collectives" / "membership"
WARM = ("hypothesis", "collectives.membership.protocol", "tests.membership.faults", "tests.membership.judge")
"""What is imported before the fork: it takes time, and imports none of these files."""
UNITS = ("coordinator", "deadlines", "decisions", "member", "frontiers", "claims", "stalls")
"""Tests of the state machines without a simulation."""

FIRST = 12
"""Histories before the unit tests: most mutants do not outlive them."""

HISTORY_SECONDS, UNITS_SECONDS = 2.0, 20.0
"""Of CPU time, after which a history (some milliseconds) or all unit tests (a tenth of a second) count as endless."""

CPU_SECONDS, WALL_SECONDS = 300, 1200.0
"""Hard limits of a trial, kept by the kernel and by the parent."""

MEMORY = 4 << 30
"""Bytes of address space: a mutant may fill the memory."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file."""

    file: str
    source: str
    line: int
    before: str
    after: str


class Hung(BaseException):
    """A mutant took too long; no `except Exception` of the code under test stops this."""


class _Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from another text than that of its file."""

    source = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder:
    """Finds the mutant where the module is asked for."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = f"{PACKAGE}.{mutant.file}"
        self._loader = _Changed(self._name, str(FOLDER / f"{mutant.file}.py"))
        self._loader.source = mutant.source

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_loader(name, self._loader) if name == self._name else None


def try_out(mutant: Mutant, histories: int) -> tuple[str, int]:
    """Tell what became of a mutant, and how many histories were played.

    "import": it is no module. "first", "histories": one of the first histories failed, or of the others. "units": a
    test of the state machines. "hangs": no end in time. "survived": nothing noticed.
    """
    for name in WARM:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, mutant, histories))
    child.start()
    there.close()
    try:
        end: tuple[str, int] = here.recv() if here.poll(WALL_SECONDS) else ("hangs", 0)
    except EOFError:
        end = ("hangs", 0)  # the kernel ended it
    child.kill()
    child.join()
    here.close()
    return end


def _child(out: Connection, mutant: Mutant, histories: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGVTALRM, _hang)
    loaded = {f"{PACKAGE}.{file}" for file in FILES} & set(sys.modules)
    assert not loaded, f"{loaded} was loaded before the mutant"
    sys.meta_path.insert(0, _Finder(mutant))
    out.send(_noticed_by(mutant.file, histories))


def _hang(number: int, frame: object) -> None:
    raise Hung


def _noticed_by(file: str, histories: int) -> tuple[str, int]:
    try:
        play = _within(HISTORY_SECONDS, _player)
    except Exception:
        return "import", 0
    try:
        for seed in range(histories):
            if seed == FIRST and not _within(UNITS_SECONDS, _units_hold, file):
                return "units", seed
            try:
                _within(HISTORY_SECONDS, play, seed)
            except Exception:
                return "first" if seed < FIRST else "histories", seed + 1
    except Hung:
        return "hangs", seed + 1
    return "survived", histories


def _within(seconds: float, action: Callable[..., Any], *given: Any) -> Any:
    """Call with a limit of CPU time. Raises `Hung`."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return action(*given)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _player() -> Callable[[int], None]:
    from tests.membership.history import draw
    from tests.membership.world import World

    return lambda seed: World(draw(seed)).play()


def _units_hold(file: str) -> bool:
    # What others import is not asked for what they do: its own tests, which are slow, are for itself.
    names = [name for name in UNITS if name != "frontiers" or file == name]
    try:
        for name in names:
            module = importlib.import_module(f"tests.membership.test_{name}")
            for test in [test for called, test in vars(module).items() if called.startswith("test_")]:
                for given in _cases(module, test):
                    test(**given)
    except (Exception, pytest.fail.Exception):
        return False
    return True


def _cases(module: ModuleType, test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """What pytest would call a test with, several times as fast: rows of `parametrize`, fixtures of the same module."""
    rows: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", ()):
        assert mark.name == "parametrize"
        rows = [{**row, **dict(zip(mark.args[0], values, strict=True))} for row in rows for values in mark.args[1]]
    for row in rows:
        made = [name for name in inspect.signature(test).parameters if name not in row]
        yield row | {name: inspect.unwrap(getattr(module, name))() for name in made}
