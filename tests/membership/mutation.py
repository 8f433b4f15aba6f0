"""Breaks the protocol's files by a tool and tells which breaks the simulation notices.

    nice -n 10 python -m tests.membership.mutation --json /tmp/mutants.jsonl

cosmic-ray (the extra `mutation`) writes the mutants: a number, a comparison, a condition, a loop or a decorator of one
place changed at a time. `trial.py` tries each. A run that was ended goes on from its file, with the mutants that are
not in it. By hand: the rules that `mutants.py` takes out are chosen with more thought, and all of them must be caught;
here, some are no faults at all, and docs/testing.md says which.
"""

import argparse
import difflib
import hashlib
import json
import os
import pickle
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.membership.trial import FILES, FOLDER, Mutant, try_out

Row = dict[str, Any]
"""A mutant, with a digest for its text, and what became of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is changed: the occurrence of what an operator changes."""

    file: str
    operator: str
    occurrence: int

    @property
    def key(self) -> str:
        """Names the mutant of this version of the file."""
        text = f"{self.operator} {self.occurrence} {code_of(self.file)}".encode()
        return hashlib.blake2b(text, digest_size=8).hexdigest()


@cache
def code_of(file: str) -> str:
    """The text of a file as it is."""
    return (FOLDER / f"{file}.py").read_text()


@cache
def _tree_of(file: str) -> bytes:
    """The parsed file, which each mutant changes: to copy it is quicker than to parse it again."""
    from cosmic_ray.ast import get_ast

    return pickle.dumps(get_ast(code_of(file)))


def places_of(file: str) -> list[Place]:
    """Tell every place of a file that the tool can change."""
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(pickle.loads(_tree_of(file))))
    places: list[Place] = []
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if not operator.arguments():  # else it changes only what it is told by name
            times = sum(1 for node in nodes for _ in operator().mutation_positions(node))
            places += [Place(file, name, occurrence) for occurrence in range(times)]
    return places


def mutant_at(place: Place) -> Mutant:
    """Change a file at one place."""
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    code = code_of(place.file)
    visitor = MutationVisitor(place.occurrence, get_operator(place.operator)())
    changed = visitor.walk(pickle.loads(_tree_of(place.file))).get_code()
    old, new = code.splitlines(), changed.splitlines()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    _, start, end, begin, stop = next((block for block in blocks if block[0] != "equal"), ("", 0, 0, 0, 0))
    before, after = (" ".join(line.strip() for line in lines) for lines in (old[start:end], new[begin:stop]))
    return Mutant(place.file, changed, start + 1, before, after)


def run(places: Iterable[Place], histories: int) -> Iterator[Row]:
    """Try the mutants of these places, one at a time."""
    assert try_out(Mutant("member", code_of("member"), 0, "", ""), histories)[0] == "survived", "the code must hold"
    for place in places:
        mutant = mutant_at(place)
        end, played = try_out(mutant, histories)
        shown = {"line": mutant.line, "before": mutant.before, "after": mutant.after}
        yield {"key": place.key, **asdict(place), **shown, "end": end, "histories": played}


def told(row: Row) -> str:
    """A mutant on one line."""
    return f"{row['file']}.py:{row['line']} {row['operator']}: {row['before']} -> {row['after']}"


def table(rows: Iterable[Row]) -> str:
    """Count what became of the mutants of each file."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["file"], Counter())[row["end"]] += 1
        counts.setdefault("all", Counter())[row["end"]] += 1
    ends = ("import", "first", "units", "histories", "hangs", "survived")
    lines = [" ".join(f"{cell:>11}" for cell in ("file", "tried", *ends))]
    for file in (*FILES, "all"):
        if of := counts.get(file):
            lines.append(" ".join(f"{cell:>11}" for cell in (file, of.total(), *(of[end] for end in ends))))
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(FILES), help="of the protocol, without .py; all if none")
    parser.add_argument("--sample", type=int, default=0, help="so many, drawn from a fixed seed; 0: all")
    parser.add_argument("--histories", type=int, default=1000, help="played against each")
    parser.add_argument(
        "--json", type=Path, help="a line for each, as it ends; what it holds already is not tried again"
    )
    parser.add_argument("--again", action="store_true", help="but for those that survived")
    given = parser.parse_args()
    places = {place.key: place for file in given.files for place in places_of(file)}
    # In an order of its own, so that what a run has tried when it is ended is a sample.
    places = dict(random.Random(0).sample(sorted(places.items()), min(given.sample or len(places), len(places))))
    print(f"{len(places)} mutants", file=sys.stderr, flush=True)
    rows: list[Row] = []
    if given.json and given.json.exists():
        rows = [row for row in map(json.loads, given.json.read_text().splitlines()) if row["key"] in places]
    if given.again:
        rows = [row for row in rows if row["end"] != "survived"]
    done = {row["key"] for row in rows}
    with (given.json or Path(os.devnull)).open("w") as out:
        print("".join(json.dumps(row) + "\n" for row in rows), end="", file=out, flush=True)
        for row in run([place for key, place in places.items() if key not in done], given.histories):
            print(json.dumps(row), file=out, flush=True)
            rows.append(row)
            if row["end"] == "survived":
                print(told(row), flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
