"""Breaks the protocol's files by a tool and tells which breaks the simulation notices.

    python -m tests.membership.mutation --sample 300 --jobs 2

cosmic-ray (the extra `mutation`) writes the mutants: a number, a comparison, a condition, a loop or a decorator of one
place changed at a time. Each is loaded in a process of its own, in place of the file, which stays as it is on the disk.
Histories are played until one fails; what outlives them meets the tests of the state machines themselves. By hand: the
rules that `mutants.py` takes out are chosen with more thought, and all of them must be caught; here, some are no faults
at all, and docs/testing.md says which.
"""

import argparse
import contextlib
import difflib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import multiprocessing
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

PACKAGE = "collectives.membership"
FILES = ("coordinator", "member", "decisions", "frontiers", "claims", "stalls", "roster")
FOLDER = Path(__file__).resolve().parents[2] / "collectives" / "membership"
UNITS = ("coordinator", "member", "frontiers", "claims", "stalls")
"""Tests of the state machines without a simulation."""

PATIENCE = 30.0
"""Seconds of CPU time after which a mutant that neither fails nor ends counts as one that hangs."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file."""

    file: str
    operator: str
    occurrence: int
    source: str
    line: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a mutant: "import" (it is no module), "history", "hangs", "units" (tests) or "survived"."""

    mutant: Mutant
    end: str
    histories: int


class Hung(BaseException):
    """A mutant took too long; no `except Exception` of the code under test stops this."""


def mutants_of(file: str) -> Iterator[Mutant]:
    """Make every mutant of a file."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    code = (FOLDER / f"{file}.py").read_text()
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments():
            continue  # it changes only what it is told by name
        for occurrence in itertools.count():
            changed = mutate_code(code, operator(), occurrence)
            if changed is None:
                break
            yield _mutant(file, name, occurrence, code, changed)


def _mutant(file: str, operator: str, occurrence: int, code: str, changed: str) -> Mutant:
    old, new = code.splitlines(), changed.splitlines()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    _, start, end, begin, stop = next((block for block in blocks if block[0] != "equal"), ("", 0, 0, 0, 0))
    before, after = (" ".join(line.strip() for line in lines) for lines in (old[start:end], new[begin:stop]))
    return Mutant(file, operator.removeprefix("core/"), occurrence, changed, start + 1, before, after)


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


def try_out(work: tuple[Mutant, int]) -> Fate:
    """Load a mutant into this fresh process and play histories with it."""
    mutant, histories = work
    assert f"{PACKAGE}.{mutant.file}" not in sys.modules, "the mutant must be the first to load"
    sys.meta_path.insert(0, _Finder(mutant))
    signal.signal(signal.SIGVTALRM, _hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    seed = 0
    try:
        from tests.membership.history import draw
        from tests.membership.world import World
    except Exception:
        return Fate(mutant, "import", 0)
    try:
        for seed in range(histories):
            World(draw(seed)).play()
    except Hung:
        return Fate(mutant, "hangs", seed + 1)
    except Exception:
        return Fate(mutant, "history", seed + 1)
    return Fate(mutant, "survived" if _units_hold() else "units", histories)


def _hang(number: int, frame: object) -> None:
    raise Hung


def _units_hold() -> bool:
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in UNITS]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files]) == 0


def run(files: Sequence[str], sample: int, histories: int, jobs: int, seed: int = 0) -> Iterator[Fate]:
    """Try a sample (0: all) of the mutants of these files; one process each."""
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    print(f"{len(mutants)} mutants", file=sys.stderr, flush=True)
    if sample:
        mutants = random.Random(seed).sample(mutants, min(sample, len(mutants)))
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        unchanged = Mutant("member", "unchanged", 0, (FOLDER / "member.py").read_text(), 0, "", "")
        assert pool.apply(try_out, ((unchanged, histories),)).end == "survived", "the code as it is must hold"
        yield from pool.imap_unordered(try_out, [(mutant, histories) for mutant in mutants], chunksize=1)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(FILES), help="of the protocol, without .py; all if none")
    parser.add_argument("--sample", type=int, default=0, help="so many, drawn from a fixed seed; 0: all")
    parser.add_argument("--histories", type=int, default=400, help="played against each")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a line for each, as it ends")
    given = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(given.json.open("w")) if given.json else None
        for fate in run(given.files, given.sample, given.histories, given.jobs):
            mutant = fate.mutant
            counts.setdefault(mutant.file, Counter())[fate.end] += 1
            if fate.end == "survived":
                print(
                    f"{mutant.file}.py:{mutant.line} {mutant.operator}: {mutant.before} -> {mutant.after}", flush=True
                )
            if out:
                row = asdict(fate)
                del row["mutant"]["source"]
                print(json.dumps(row), file=out, flush=True)
    for file, ends in sorted(counts.items()):
        print(f"{file:12} {ends.total():4d} tried: {', '.join(f'{n} {end}' for end, n in ends.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
