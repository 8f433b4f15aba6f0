"""Kills members at random instants of all-reduces in place, hundreds of times, and checks every element of every sum.

    python -m benchmarks.kills --kills 300 --seed 1 --stops 24

Groups of 3 to 5 peers reduce tensors of 1 KiB to 16 MiB back to back; this process kills them from outside, at random
times and (a third) at fault points around the confirmation, and refills the group. Stopped members (SIGSTOP) must be
evicted, learn of it when they wake, and come back. Exits with 1 on a wrong sum, a changed input, results that differ
between survivors, a hang or a leak; and where the strikes did not test what they should.
"""

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import spread, table, write_json
from benchmarks.kills_audit import Audit
from benchmarks.kills_peer import ACTIVE, AIM, AIM_DELAY, AIM_SIGNAL, ENTERED, LEAVE, LEFT, STRUCK, check_members
from collectives import faults
from launch.churn_strike import Strike
from launch.crew import Crew, Message, Peer

KILLS_OF_A_GROUP = 25
HANG_SECONDS = 20.0
ONE_HOST = ("gloo", "sockets", "shm")
AIMED = 1 / 3
OVERLAPPING = 1 / 6
"""Kills that are followed by another one within moments, in the middle of the recovery."""
WINDOW = ("end", "staged", "staged", "staged", "confirmed", "copied")
"""Fault points around the confirmation."""


class Hang(Exception):
    """Something did not happen in time; the group cannot go on."""


class Failed(Exception):
    """A peer ended with an error; the group cannot go on."""


class Group:
    """One run: its peers, and the strikes against them.

    Args:
        crew: its processes.
        audit: who judges what they report.
        seed: of the group.
        size: members to keep up.
        veteran: spare one of the founders, so that somebody lives through everything.
        transport: of the run.

    """

    def __init__(self, crew: Crew, audit: Audit, seed: int, size: int, veteran: bool, transport: str) -> None:
        self._crew, self._audit, self._size = crew, audit, size
        self._rng = random.Random(f"group {seed}")
        self._work = partial(check_members, seed=seed, transport=transport)
        self._members: dict[int, int] = {}
        self._working: set[int] = set()
        self._asked_to_leave = False
        self._moved: dict[int, tuple[int, float]] = {}
        audit.new_group()
        for _ in range(size):
            crew.start_peer(self._work)
        self._until(self._all_work, "the founders did not begin")
        self._spared = self._rng.choice(sorted(self._working)) if veteran else -1

    def kill(self) -> int:
        """Kill a member at a random instant or at a fault point, perhaps a second one at once; returns how many."""
        rng = self._rng
        kills = 1 + (self._size > 3 and rng.random() < OVERLAPPING)
        self._pump(rng.uniform(0.0, 0.4))
        for number in range(kills):
            if number:
                self._pump(rng.uniform(0.0, 0.08))
            aimed = number == 0 and rng.random() < AIMED
            strike = self._strike(signal.SIGKILL, rng.choice(WINDOW) if aimed else "")
            strike.overlapping = kills > 1
        self._refill()
        self._until(self._recovered, "the group did not recover from a kill")
        return kills

    def stop(self) -> None:
        """Stop a member until it is evicted and the others went on; wake it; it must come back as a new one."""
        rng = self._rng
        self._pump(rng.uniform(0.0, 0.4))
        strike = self._strike(signal.SIGSTOP, rng.choice(faults.POINTS[1:]) if rng.random() < 0.5 else "")
        self._until(lambda: strike.over, "the survivors did not go on without the stopped member")
        self._pump(rng.uniform(0.0, 0.2))
        self._working.discard(strike.victim)
        self._crew.peers[strike.victim].signal(signal.SIGCONT)
        self._until(lambda: strike.evicted and self._recovered(), "the stopped member did not come back")

    def end(self) -> None:
        """Let everybody leave and tell what they hold."""
        self._asked_to_leave = True
        for peer in self._living():
            peer.words[LEAVE] = 1
        self._until(lambda: not self._living(), "members did not leave")

    # --- striking ---

    def _strike(self, number: signal.Signals, point: str) -> Strike:
        living = [peer for peer in self._living() if peer.name in self._working]
        victim = self._rng.choice([peer for peer in living if peer.name != self._spared])
        survivors = {peer.name for peer in self._living()} - {victim.name}
        kind = "kill" if number == signal.SIGKILL else "stop"
        index = len(self._audit.strikes)
        strike = Strike(index, kind, point, victim.name, self._members[victim.name], survivors)
        self._audit.strikes.append(strike)
        if point:
            self._aim(victim, number, strike)
        else:
            strike.time = time.time()
            victim.signal(number)
        if kind == "kill":
            self._until(lambda: victim.pipe is None, "a killed process did not end")
        else:
            victim.stopped = True
        strike.inside = victim.words[ENTERED] > victim.words[LEFT]
        return strike

    def _aim(self, victim: Peer, number: signal.Signals, strike: Strike) -> None:
        """Have the victim strike itself; the strike's messages count from the moment when it did."""
        strike.time = float("inf")
        words = victim.words
        words[AIM_SIGNAL] = number
        words[AIM_DELAY] = int(self._rng.choice((0.0, 0.0, 0.005, 0.05)) * self._rng.random() * 1e6)
        words[AIM] = 1 + faults.POINTS.index(strike.point)
        end = time.monotonic() + HANG_SECONDS
        while not words[STRUCK]:
            if time.monotonic() > end:
                raise Hang(f"peer {victim.name} passed no {strike.point!r} to be struck at")
            self._pump_once(0.002)
        strike.time, words[STRUCK] = words[STRUCK] / 1e9, 0
        time.sleep(0.001)  # the signal follows the note at once

    def _refill(self) -> None:
        while len(self._living()) < self._size:
            self._crew.start_peer(self._work)

    # --- waiting ---

    def _living(self) -> list[Peer]:
        return [peer for peer in self._crew.peers if peer.pipe is not None]

    def _all_work(self) -> bool:
        return all(peer.name in self._working for peer in self._living())

    def _recovered(self) -> bool:
        return self._all_work() and not self._audit.open_strikes()

    def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + 2 * HANG_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise Hang(complaint)
            self._pump_once(0.05)

    def _pump(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._pump_once(left)

    def _pump_once(self, timeout: float) -> None:
        for peer, message in self._crew.receive(timeout):
            self._audit.hear(peer, message)
            self._hear(peer, message)
        now = time.monotonic()
        for peer in self._living():
            count, since = self._moved.get(peer.name, (-1, now))
            if peer.words[ACTIVE] != count or peer.stopped:
                self._moved[peer.name] = (peer.words[ACTIVE], now)
            elif now - since > HANG_SECONDS:
                raise Hang(f"peer {peer.name} did not move for {HANG_SECONDS:g} s")

    def _hear(self, peer: Peer, message: Message) -> None:
        match message["type"]:
            case "joined":
                self._members[peer.name] = message["member"]
            case "op":
                self._working.add(peer.name)
            case "evicted":
                self._working.discard(peer.name)
                mine = [s for s in self._audit.strikes if s.kind == "stop" and s.victim == peer.name and not s.evicted]
                for strike in mine:
                    strike.evicted = True
                if not mine:
                    self._audit.evictions.append(message["reason"])
            case "failed":
                raise Failed(f"peer {peer.name}: {message['error']}: {message['message']}")
            case "gone":
                self._working.discard(peer.name)
                self._audit.gone(peer.name, message["time"])


@click.command()
@click.option("--kills", default=300, show_default=True, help="Members to kill.")
@click.option("--stops", default=0, show_default=True, help="Members to stop and wake.")
@click.option("--seed", default=1, show_default=True, help="Of sizes, victims and times.")
@click.option("--transport", type=click.Choice(ONE_HOST), default="gloo", show_default=True, help="Of all members.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(kills: int, stops: int, seed: int, transport: str, json_file: Path | None) -> None:
    """Kill and stop members of groups that reduce, and check every result."""
    audit, began = Audit(), time.monotonic()
    for _ in run_groups(audit, kills, stops, seed, transport):
        if sys.stderr.isatty():
            print(f"\r{_progress(audit, kills, stops)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    report = summary(audit, time.monotonic() - began)
    report["seed"], report["transport"] = seed, transport
    report["replay"] = (
        f"python -m benchmarks.kills --kills {kills} --stops {stops} --seed {seed} --transport {transport}"
    )
    complaints = judge(report)
    print_summary(report, audit, complaints)
    write_json(json_file, {**report, "failed": complaints, "strikes": [strike.report() for strike in audit.strikes]})
    sys.exit(1 if complaints else 0)


def run_groups(audit: Audit, kills: int, stops: int, seed: int, transport: str) -> Iterator[None]:
    """Strike group after group; yields after each strike."""
    groups = max(1, -(-kills // KILLS_OF_A_GROUP))
    for index in range(groups):
        killed = sum(strike.kind == "kill" for strike in audit.strikes)
        stopped = len(audit.strikes) - killed
        kills_here, stops_here = (
            (total - done) // (groups - index) for total, done in ((kills, killed), (stops, stopped))
        )
        if index == groups - 1:
            kills_here, stops_here = kills - killed, stops - stopped
        size = 3 + index % 3
        with Crew({"founders": size}) as crew:
            try:
                group = Group(crew, audit, 1000 * seed + index, size, bool(index % 2), transport)
                yield from _strike(group, random.Random(f"order {1000 * seed + index}"), kills_here, stops_here)
            except (Failed, Hang) as error:
                # What was under way says nothing about recovery times.
                audit.strikes = [strike for strike in audit.strikes if strike.over]
                report = audit.wrong if isinstance(error, Failed) else audit.hangs
                report.append(f"group {index}: {error}\n{_evidence(crew)}")


def _evidence(crew: Crew) -> str:
    """Stacks of the peers that are there, and the end of the logs."""
    there = [peer for peer in crew.peers if peer.pipe is not None and not peer.stopped]
    for peer in there:
        peer.signal(signal.SIGUSR1)
    time.sleep(0.5)
    logs = [crew.folder / "coordinator.log", *(peer.log for peer in there)]
    texts = [f"--- {log.stem}\n{log.read_text(errors='replace')[-30000:]}" for log in logs]
    return "\n".join([crew.status(), *texts])


def _strike(group: Group, rng: random.Random, kills: int, stops: int) -> Iterator[None]:
    while kills > 0 or stops > 0:
        if rng.random() * (kills + stops) < kills:
            kills -= group.kill()
        else:
            group.stop()
            stops -= 1
        yield
    group.end()


def summary(audit: Audit, seconds: float) -> dict[str, Any]:
    """Figures of a run; times in milliseconds, from the signal to the last survivor."""
    kills = [strike for strike in audit.strikes if strike.kind == "kill"]
    stops = [strike for strike in audit.strikes if strike.kind == "stop"]
    return {
        "kills": len(kills),
        "inside": sum(strike.inside for strike in kills),
        "aimed": sum(bool(strike.point) for strike in kills),
        "overlapping": sum(strike.overlapping for strike in kills),
        "from_staging": sum(strike.from_staging for strike in kills),
        "run_again": sum(strike.run_again for strike in kills),
        "stops": len(stops),
        "stops_inside": sum(strike.inside for strike in stops),
        "stops_returned": sum(strike.evicted for strike in stops),
        "operations_checked": audit.operations,
        "gib_checked": round(audit.checked_bytes / (1 << 30), 2),
        "wrong": len(audit.wrong),
        "hangs": len(audit.hangs),
        "leaks": len(audit.leaks),
        "evictions_unasked": len(audit.evictions),
        "growth_mib_max": max(audit.growth, default=0) >> 20,
        "kill_detected_ms": _times(kills, "detected"),
        "kill_ready_ms": _times(kills, "ready"),
        "kill_good_ms": _times(kills, "good"),
        "stop_detected_ms": _times(stops, "detected"),
        "stop_good_ms": _times(stops, "good"),
        "seconds": round(seconds, 1),
    }


def _times(strikes: list[Strike], what: str) -> dict[str, float | int | None]:
    single = [strike for strike in strikes if not strike.overlapping]
    times = [getattr(strike, what) for strike in single]
    return spread([1000 * max(one.values()) for one in times if one])


def judge(report: dict[str, Any]) -> list[str]:
    """What the run failed by."""
    complaints = [f"{report[what]} {what}" for what in ("wrong", "hangs", "leaks") if report[what]]
    if 2 * report["inside"] < report["kills"]:
        complaints.append(f"only {report['inside']} of {report['kills']} kills were inside an operation")
    if report["stops_returned"] < report["stops"]:
        complaints.append(f"only {report['stops_returned']} of {report['stops']} stopped members came back")
    for recovery in ("from_staging", "run_again"):
        if report["kills"] and not report[recovery]:
            complaints.append(f"no operation was seen to recover by {recovery}")
    return complaints


def print_summary(report: dict[str, Any], audit: Audit, complaints: list[str]) -> None:
    """Print what happened."""
    for text in (*audit.wrong[:10], *audit.leaks[:10], *audit.hangs[:3], *audit.evictions[:10]):
        print(text)
    plain = {key: value for key, value in report.items() if not isinstance(value, dict)}
    print(table(["what", "figure"], [[key.replace("_", " "), value] for key, value in plain.items()]))
    spreads = {key: value for key, value in report.items() if isinstance(value, dict)}
    print()
    print(
        table(
            ["time to the last survivor", "p50", "p99", "max"],
            [[k, v["p50"], v["p99"], v["max"]] for k, v in spreads.items()],
        )
    )
    print(f"\nfailed: {'; '.join(complaints)}" if complaints else "\nok: nothing wrong, no hang, no leak")


def _progress(audit: Audit, kills: int, stops: int) -> str:
    killed = sum(strike.kind == "kill" for strike in audit.strikes)
    return (
        f"{killed}/{kills} kills, {len(audit.strikes) - killed}/{stops} stops, {audit.operations} operations checked, "
        f"{len(audit.wrong)} wrong, {len(audit.hangs)} hangs, {len(audit.leaks)} leaks"
    )


if __name__ == "__main__":
    main()
