"""A group that stays: peers that joined once and then run one function after the other, in lockstep.

    def total(comm: Communicator, count: int) -> float:          # in a module of its own, as programs are
        return comm.all_reduce(torch.ones(count)).result.sum().item()

    with Residents(3) as group:
        assert group.run(total, count=5) == [15.0, 15.0, 15.0]   # by rank

For suites of many cases on a healthy group; where members shall die, use programs of a `Cluster`.
"""

import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tests.harness.cluster import PATIENCE, Cluster, Process
from tests.harness.peer import Peer, resolve


def reside(peer: Peer) -> None:
    """The program of each of them."""
    with peer.join() as comm:
        peer.say("joined", rank=comm.rank)
        while True:
            job = peer.hear("job", timeout=3600.0)
            if not job["function"]:
                return
            try:
                value = resolve(job["function"])(comm, **job["given"])
            except Exception:
                peer.say("done", failure=traceback.format_exc())
            else:
                peer.say("done", failure="", value=value)


class Residents:
    """`size` peers in a cluster of their own, made by `cluster`; a context manager."""

    def __init__(
        self, size: int, *, transport: str = "", cluster: Callable[..., Cluster] = Cluster, **options: Any
    ) -> None:
        self.size = size
        self.cluster = cluster(transport=transport, founders=size, **options)
        joining = self.cluster.peers(reside, size)
        self.ranked: list[Process] = sorted(joining, key=lambda process: process.expect("joined")["rank"])

    def start(self, function: Callable[..., Any], /, **given: Any) -> None:
        """Have every member run `function(comm, **given)`."""
        reference = f"{function.__module__}:{function.__qualname__}"
        for process in self.ranked:
            process.tell("job", function=reference, given=given)

    def collect(self, timeout: float = PATIENCE) -> list[Any]:
        """Return what the members returned, by rank; what one of them raised fails the test."""
        answers = [process.expect("done", timeout=timeout) for process in self.ranked]
        for rank, answer in enumerate(answers):
            assert not answer["failure"], f"rank {rank}: {answer['failure']}"
        return [answer["value"] for answer in answers]

    def run(self, function: Callable[..., Any], /, **given: Any) -> list[Any]:
        """`start` and `collect`."""
        self.start(function, **given)
        return self.collect()

    def close(self) -> None:
        """Have all leave; whatever went wrong in them unseen fails the test."""
        for process in self.ranked:
            process.tell("job", function="", given={})
        for process in self.ranked:
            process.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self.cluster.close()
