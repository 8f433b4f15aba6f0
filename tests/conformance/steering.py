"""The test's end of `steered.steered`: a group whose members do what they are told."""

import signal
from collections.abc import Iterable
from typing import Any

from tests.conformance.steered import steered
from tests.harness.cluster import Cluster, Process


class Crew:
    """The members of a cluster by rank, as they joined; `found` and `join` start them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.members: list[Process] = []
        self.joined: dict[Process, dict[str, Any]] = {}

    def found(self, size: int, **options: Any) -> list[Process]:
        """Start the founders."""
        self.taken(self.cluster.peers(steered, size, **options))
        return self.members

    def waiting(self, count: int, **options: Any) -> list[Process]:
        """Start peers that wait to be admitted; returns when the coordinator says that they do."""
        before = self.cluster.status().waiting
        joiners = self.cluster.peers(steered, count, **options)
        self.cluster.await_status(lambda status: status.waiting == before + count)
        return joiners

    def taken(self, processes: Iterable[Process]) -> None:
        """Take note of peers that have become members."""
        for process in processes:
            self.joined[process] = process.expect("joined")
            self.members.append(process)
        self.members.sort(key=lambda process: self.joined[process]["member"])

    def start(self, what: str, who: Iterable[Process] | None = None, **given: Any) -> None:
        """Tell some, or all, to do something."""
        for process in self.members if who is None else who:
            process.tell("do", what=what, **given)

    def done(self, who: Iterable[Process] | None = None) -> list[dict[str, Any]]:
        """What they say when it is done."""
        return [process.expect("done") for process in (list(self.members) if who is None else who)]

    def reduce(self, times: int = 1, lane: str = "main") -> list[dict[str, Any]]:
        """Have all reduce."""
        self.start("reduce", times=times, lane=lane)
        return self.done()

    def lose(self, rank: int, point: str = "transfer") -> list[dict[str, Any]]:
        """Have the member of that rank die in a reduction of all; what the others say of it."""
        victim = self.doom(rank, point)
        self.start("reduce", [*self.members, victim], times=1)
        self.buried(victim)
        return self.done()

    def doom(self, rank: int, point: str) -> Process:
        """Have a member die at a point of its next all-reduce; it counts as a member no more."""
        victim = self.members.pop(rank)
        victim.tell("do", what="die at", point=point)
        victim.expect("done")
        return victim

    def buried(self, victim: Process) -> None:
        """Wait for the end of one that was to die."""
        assert victim.expect("fired")
        assert victim.ending().signal == signal.SIGKILL

    def ids(self) -> list[int]:
        """The members' ids by rank."""
        return [self.joined[process]["member"] for process in self.members]

    def leave(self) -> None:
        """Have all leave."""
        self.start("leave")
        for process in self.members:
            process.result()
        self.members.clear()


def assert_all_contributed(answers: list[dict[str, Any]], crew: Crew) -> None:
    for answer in answers:
        assert answer.get("contributors") == crew.ids(), answer
