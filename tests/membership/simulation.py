"""Plays seeded histories of the membership protocol; as a script, it replays or explores.

    python tests/membership/simulation.py --seed 17              # one history, with its trace if it fails
    python tests/membership/simulation.py --seed 0 --count 5000  # many, what they touched, and branches they never took
    python tests/membership/simulation.py --count 5000 --unwatched  # how fast they are

Everything that can differ between two runs (network, clock, disk, crashes, threads) is drawn from the seed.
"""

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.membership.branches import Branches, watch
from tests.membership.history import History, draw
from tests.membership.judge import Violation
from tests.membership.shrink import as_test, failure, shrink
from tests.membership.world import LONG, World

LOOK = 500
"""Histories after which it is looked whether every branch was taken."""


@dataclass(slots=True)
class Report:
    """What a number of histories touched."""

    histories: int = 0
    long: int = 0
    """Histories of 200 events or more."""
    events: int = 0
    seconds: float = 0.0
    """Of CPU time."""
    seen: Counter[str] = field(default_factory=Counter)


def play(seed: int) -> World:
    """Play one history. Raises `Violation` with the seed and the trace."""
    world = World(draw(seed))
    try:
        world.play()
    except Exception:
        # Once more, to tell how it came to that: the same seed gives the same history.
        raise Violation(f"{trace(seed)}\n\nas a test case, without what is not needed:\n\n{case_of(seed)}") from None
    return world


def case_of(seed: int) -> str:
    """Shrink a history that fails, and write it as a test that can be pasted into a file."""
    small = shrink(draw(seed), lambda history: failure(history) is not None)
    return f"{as_test(small)}\n# {failure(small)}"


def trace(seed: int) -> str:
    """Play a history and tell what happens, to its end or to its failure."""
    history = draw(seed)
    text = describe(history)
    world = World(history, tracing=True)
    assert world.lines is not None
    try:
        world.play()
    except Exception as error:
        world.lines.append(f"{type(error).__name__}: {error}")
    return "\n".join([text, *world.lines[-400:]])


def describe(history: History) -> str:
    """Say what a history is about."""
    program = " ".join(
        f"{n}:{spec.kind}"
        + ("!" if spec.on_loss == "raise" else "")
        + ("+" if spec.batch else "")
        + (f"|{spec.side_until}" if spec.side_until else "")
        + ("x" if spec.cross else "")
        for n, spec in enumerate(history.program, 1)
    )
    lines = [
        f"seed {history.seed}: {history.theme}, {history.founders} founders, {len(history.arrivals)} hosts, "
        f"quorum {history.options.quorum}, min_members {history.options.min_members}",
        f"program {program}; side {' '.join(history.side)}",
        f"deviations {history.deviations}",
        *(f"{team}" for team in history.teams),
        *(f"{fault}" for fault in history.faults),
        "replay: python tests/membership/simulation.py --seed " + str(history.seed),
    ]
    return "\n".join(lines)


@contextmanager
def _rarely_collected(every: int = 100) -> Iterator[Callable[[], None]]:
    """Look for garbage once in `every` calls of what this yields, not at any time: a history's objects die together."""
    calls = 0

    def played() -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield played
    finally:
        gc.enable()
        gc.unfreeze()


def first_violation(most: int, themes: tuple[str, ...] = ()) -> int:
    """Return the first seed below `most` (of histories with these themes, if any) that breaks a rule, -1 if none."""
    with _rarely_collected() as played:
        for seed in range(most):
            history = draw(seed)
            if not themes or history.theme in themes:
                try:
                    World(history).play()
                except Exception:
                    return seed
                played()
    return -1


def explore(first: int, count: int, branches: Branches | None = None) -> Report:
    """Play `count` histories from seed `first` on, watched until they took every branch.

    Raises:
        Violation: at the first that fails.

    """
    report = Report()
    began = time.process_time()
    with _rarely_collected() as played:
        for seed in range(first, first + count):
            world = play(seed)
            report.histories += 1
            report.long += world.events >= LONG
            report.events += world.events
            report.seen.update(world.judge.seen)
            played()
            if branches is not None and report.histories % LOOK == 0:
                branches.look()
    report.seconds = time.process_time() - began
    return report


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--unwatched", action="store_true", help="do not tell the branches taken: the speed as it is")
    parser.add_argument("--trace", action="store_true", help="print the trace of a history that holds, too")
    given = parser.parse_args()
    if given.trace:
        print(trace(given.seed))
        return 0
    try:
        with nullcontext(None) if given.unwatched else watch() as branches:
            report = explore(given.seed, given.count, branches)
    except Violation as violation:
        print(violation)
        return 1
    for what, times in sorted(report.seen.items()):
        print(f"{times:9d}  {what}")
    if branches is not None:
        print(f"{len(branches.taken)} branches of the coordinator's and the member's state machines taken")
        print("".join(f"never: {branch}\n" for branch in branches.never), end="")
    seconds = max(report.seconds, 1e-9)
    rate, long = report.histories / seconds, report.long / seconds
    print(f"{report.histories} histories held, {report.events} events")
    print(f"{rate:.0f} histories a second of CPU time, {long:.0f} of them of {LONG} events or more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
