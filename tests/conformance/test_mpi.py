"""The transport mpi in jobs of real `mpirun`, with Open MPI and MPICH: results, deaths, stops, who may come."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conformance import kept_back, mpi_jobs, operations, spawned
from tests.conformance.losses import mortal
from tests.conformance.test_r6_losses import judge
from tests.conformance.test_r11_silences import stop_and_wake
from tests.conformance.transports import WORLDS
from tests.harness.cluster import Process
from tests.harness.mpi import MPICH, OPEN_MPI
from tests.harness.residents import Residents

LIBRARIES = {"openmpi": OPEN_MPI, "mpich": MPICH}
CROWD = 8
LIGHT = (operations.reduce_everything, operations.scatter_reductions, operations.gather_rows, operations.run_schedules)
"""What eight ranks do, which are a crowd on a few cores; the rest makes each compute much of what all of them give."""
JOBS = [(library, world) for library in LIBRARIES for world in WORLDS[library]]
CASES = [(job, function) for job in JOBS for function in (LIGHT if job[1] == CROWD else operations.RESULTS)]


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest) -> Iterator[Residents]:
    """The ranks of a job."""
    library, world = request.param
    with Residents(world, transport="mpi", cluster=LIBRARIES[library]) as group:
        yield group


def name(value: Any) -> str:
    """For the names of tests."""
    return str(value.__name__) if callable(value) else f"{value[0]}-{value[1]}"


@pytest.mark.parametrize(("group", "function"), CASES, indirect=["group"], ids=name, scope="module")
def test_results_are_those_of_arithmetic_and_equal_on_all_ranks(group: Residents, function: Callable[..., Any]) -> None:
    first, *others = group.run(function)
    assert first, "it checked nothing"
    for rank, digests in enumerate(others, start=1):
        assert digests == first, f"rank {rank} has other bits than rank 0"


@pytest.mark.parametrize("group", JOBS, indirect=True, ids=name)
def test_nobody_leaves_a_barrier_before_all_have_entered(group: Residents) -> None:
    for times in zip(*group.run(operations.barriers), strict=True):
        assert max(entered for entered, _ in times) <= min(left for _, left in times)


DEATHS = [
    ("all_reduce", ["begin", "transfer", "reduce"], 0),
    ("all_reduce out of place", ["staged", "confirmed", "copied"], 1),
    ("all_gather", ["transfer", "end", "enter"], 2),
    ("reduce_scatter", ["reduce", "end", "transfer"], 3),
]


@pytest.mark.parametrize(("kind", "points", "rank"), DEATHS)
def test_survivors_of_killed_ranks_end_alike_and_go_on(kind: str, points: list[str], rank: int) -> None:
    victims = [rank, (rank + 1) % 3, rank % 2]
    with OPEN_MPI(founders=4) as cluster:
        living = cluster.peers(mortal, 4, kind=kind, points=points, size="bulk", victims=victims)
        for victim, point in zip(victims, points, strict=True):
            reports = []
            for process in list(living):
                word = process.expect("report", "fired")
                if word["event"] == "report":
                    reports.append(word)
                    continue
                assert process.ending().signal == signal.SIGKILL
                living.remove(process)
            judge(reports, kind, point, victim, "mpi")
        for process in living:
            process.result()


def test_a_stopped_rank_is_evicted_and_may_join_again() -> None:
    with OPEN_MPI(founders=3, heartbeat=0.1, heartbeat_timeout=2.0) as cluster:
        stop_and_wake(cluster, "transfer")


def test_nothing_of_an_abandoned_epoch_stays_in_mpi() -> None:
    with OPEN_MPI(founders=4) as cluster:
        members = cluster.peers(mpi_jobs.settle, 4, rounds=2)
        endings = [process.ending() for process in members]
    survivors = [ending.value for ending in endings if not ending.signal]
    assert len(survivors) == 2
    assert survivors[0] == survivors[1]
    assert survivors[0]["left"] == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_sends_that_were_not_received_end_in_the_next_epoch(library: str) -> None:
    with LIBRARIES[library](founders=2) as cluster:
        results = cluster.run(mpi_jobs.abandon, 2)
    for result in results:
        assert result["held"] > 0, "nothing was under way"
        assert result["left"] == 0
        assert result["got"] == [[1], [9]]
        assert "aborted" in result["said"]


def test_ranks_that_are_spawned_join_and_die_as_others_do() -> None:
    with OPEN_MPI(founders=3) as cluster:
        endings = [process.ending() for process in cluster.peers(spawned.founder, 3)]
    survivor = [ending.value for ending in endings if not ending.signal]
    assert survivor == [[[1, 2], [1, 2, 4, 5], [1, 2, 4], [1, 4, 6], True, [1, 4, 6]]], endings


def test_what_mpi_keeps_back_is_sent_while_the_sender_waits_for_a_note() -> None:
    with OPEN_MPI(founders=1) as cluster:
        assert cluster.run(kept_back.founder, 1) == ["all came"]


def test_long_messages_go_in_pieces() -> None:
    with OPEN_MPI(founders=2) as cluster:
        assert cluster.run(mpi_jobs.large, 2) == [[2, 2 * 199_999]] * 2


def test_a_process_of_no_job_is_refused_and_the_members_go_on() -> None:
    with OPEN_MPI(founders=2, transport="mpi") as cluster:
        members = cluster.peers(mpi_jobs.hosts, 2)
        for process in members:
            process.expect("joined")
        said = cluster.peer(mpi_jobs.stranger).result()
        assert [process.result() for process in members] == [{"size": 2}] * 2
    assert "no rank of the MPI job" in said
    assert "one mpirun" in said


def test_mpich_says_that_it_cannot_go_on_after_a_death() -> None:
    with MPICH(founders=3) as cluster:
        members = cluster.peers(mortal, 3, kind="all_reduce", points=["transfer"], size="bulk", victims=[1])
        errors = [error for process in members if (error := unsupported(process)) is not None]
    assert all("MPICH" in error and "--with-ft ulfm" in error for error in errors)


def unsupported(process: Process) -> str | None:
    """How a rank of MPICH ended after a death: by `Unsupported`, or by its launcher, which may be faster; never not."""
    ending = process.ending(timeout=30.0)
    if ending.signal:
        return None
    assert ending.error == "Unsupported", ending
    return ending.message
