"""Ranks of a benchmark in processes of the harness, which start sooner than commands; see `test_bench`."""

from typing import Any

from collectives.communicator import Communicator
from launch.bench_rank import Place, Rank
from launch.bench_request import Request
from tests.harness.cluster import TOKEN, Cluster
from tests.harness.peer import Peer


class SeatedRank(Rank):
    """A rank whose runs all have the name that clusters give theirs."""

    def _join(self, run: str, transport: str) -> Communicator:
        return Communicator.join(self._place.coordinators[run], Cluster.RUN, TOKEN, transport)


def measure(
    _peer: Peer, rank: int, ranks: int, coordinators: dict[str, str], requests: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run the benchmarks one after the other; returns what rank 0 told."""
    told: list[dict[str, Any]] = []
    for request in requests:
        with SeatedRank(Request.from_json(request), Place(rank, ranks, coordinators, TOKEN), told.append) as seated:
            seated.measure()
    return told
