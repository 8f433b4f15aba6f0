"""How long the survivors of a SIGKILL take, stage by stage, until the first good operation of the new epoch.

    python -m benchmarks.recovery
    python -m benchmarks.recovery --transport shm

Four peers, idle or in all-reduces of 16 MiB back to back, lose a random member at a random instant, and are refilled by
one that joins. Times are from the kill to the *last* survivor, in milliseconds.
"""

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.figures import spread, table, write_json
from collectives.communicator import Communicator
from collectives.errors import RingholdError
from launch.churn_strike import STAGES, Strike
from launch.crew import Crew, Desk, Peer

ASKED = 0
"""The word that tells how many safe points an idle peer is asked to pass."""
BUSY_BYTES, IDLE_BYTES = 16 << 20, 1 << 10
ADMIT_EVERY = 4
"""Operations of a busy peer between two safe points."""
PATIENCE = 30.0
LABELS = {
    "detected": "old epoch fenced",
    "announced": "new epoch announced",
    "ready": "its transport is ready",
    "good": "first good operation",
}


class _Member:
    """A peer: it reduces back to back, or once whenever the membership changed."""

    def __init__(self, desk: Desk, busy: bool, transport: str) -> None:
        self._desk, self._busy = desk, busy
        self._ready = threading.Event()
        self._tensor = torch.ones((BUSY_BYTES if busy else IDLE_BYTES) // 4)
        self._sum = torch.zeros_like(self._tensor)
        self._comm: Communicator = desk.join(self._hear, transport)
        desk.report("joined", member=self._comm.member_id)
        (self._work if busy else self._idle)()

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self._ready.set()

    def _work(self) -> None:
        count = 0
        while True:
            self._operate()
            count += 1
            if count % ADMIT_EVERY == 0 and self._comm.admit():
                count = 0  # as for those who are new

    def _idle(self) -> None:
        passed = 0
        while True:
            if self._ready.wait(0.002):
                self._first()
            if self._desk.words[ASKED] > passed:
                passed += 1
                if self._comm.admit():
                    self._first()
                self._desk.report("asked")

    def _first(self) -> None:
        """The first operation of an epoch, when its transport is there."""
        self._ready.wait()
        self._ready.clear()
        self._operate()

    def _operate(self) -> None:
        outcome = self._comm.all_reduce(self._tensor, out=self._sum)
        done = time.time()
        if not torch.equal(self._sum, torch.full_like(self._sum, len(outcome.contributors))):
            raise RingholdError(f"a wrong sum of members {outcome.contributors}")
        self._desk.report(
            "op",
            done=done,
            contributors=outcome.contributors,
            attempts=outcome.attempts,
            from_staging=outcome.from_staging,
        )


class _Trials:
    """One crew that loses members and is refilled."""

    def __init__(self, crew: Crew, busy: bool, size: int, transport: str, rng: random.Random) -> None:
        self._crew, self._busy, self._size, self._rng = crew, busy, size, rng
        self._work: Callable[[Desk], None] = partial(_be_member, busy=busy, transport=transport)
        self._members: dict[Peer, int] = {}
        self._at_work: set[Peer] = set()
        self._asked: set[Peer] = set()
        self._strike: Strike | None = None
        for _ in range(size):
            crew.start_peer(self._work)
        self._until(lambda: len(self._at_work) == size)

    def kill(self) -> Strike:
        """Kill a member and wait for the others; fill the group up again."""
        self._pump(self._rng.uniform(0.1, 0.4))
        victim = self._rng.choice(list(self._members))
        survivors = {peer.name for peer in self._members if peer is not victim}
        strike = Strike(0, "kill", "", victim.name, self._members[victim], survivors, time=time.time())
        self._strike = strike
        victim.signal(signal.SIGKILL)
        self._until(lambda: strike.over and victim not in self._members)
        self._crew.start_peer(self._work)
        while len(self._at_work) < self._size:
            self._ask()
        return strike

    def _ask(self) -> None:
        """Lead idle members to a safe point."""
        if not self._busy:
            self._asked.clear()
            asked = set(self._members)
            for peer in asked:
                peer.words[ASKED] += 1
            self._until(lambda: self._asked >= asked)
        self._pump(0.02)

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise RingholdError(f"the members did not recover within {PATIENCE:g} s")
            self._pump(0.02)

    def _pump(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for peer, message in self._crew.receive(left):
                if self._strike is not None:
                    self._strike.hear(peer.name, message)
                match message["type"]:
                    case "joined":
                        self._members[peer] = message["member"]
                    case "op":
                        self._at_work.add(peer)
                    case "asked":
                        self._asked.add(peer)
                    case "failed":
                        raise RingholdError(f"a peer ended with {message['error']}: {message['message']}")
                    case "gone":
                        self._members.pop(peer, None)
                        self._at_work.discard(peer)


def _be_member(desk: Desk, busy: bool, transport: str) -> None:
    _Member(desk, busy, transport)


@click.command()
@click.option("--trials", default=30, show_default=True, help="Kills, idle and busy each.")
@click.option("--peers", default=4, show_default=True, help="Members before each kill.")
@click.option("--seed", default=1, show_default=True, help="Of victims and instants.")
@click.option("--transport", default="gloo", show_default=True, help="Of all members.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(trials: int, peers: int, seed: int, transport: str, json_file: Path | None) -> None:
    """Measure the recovery from SIGKILLs."""
    report: dict[str, Any] = {"peers": peers, "trials": trials, "seed": seed, "transport": transport, "unit": "ms"}
    for load in ("idle", "busy"):
        with Crew({"founders": peers}) as crew:
            group = _Trials(crew, load == "busy", peers, transport, random.Random(f"{load} {seed}"))
            strikes = []
            for _ in range(trials):
                strikes.append(group.kill())
                if sys.stderr.isatty():
                    print(f"\r{load}: {len(strikes)}/{trials} kills", end="", file=sys.stderr, flush=True)
        report[load] = {
            stage: spread([1000 * max(getattr(strike, stage).values()) for strike in strikes if getattr(strike, stage)])
            for stage in STAGES
        }
    if sys.stderr.isatty():
        print(file=sys.stderr)
    rows = []
    for stage in STAGES:
        figures = [report[load][stage] for load in ("idle", "busy")]
        rows.append([LABELS[stage], *(one[what] for one in figures for what in ("p50", "p99", "max"))])
    print(f"{transport}: {peers} peers, {trials} kills each; ms from the kill to the last survivor")
    print(table(["", "idle p50", "p99", "max", "busy p50", "p99", "max"], rows))
    write_json(json_file, report)


if __name__ == "__main__":
    main()
