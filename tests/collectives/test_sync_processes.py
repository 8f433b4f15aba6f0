"""Sync between real processes, over the communicator, while members are killed."""

from collections.abc import Iterator

import pytest

from collectives.hashing import CHUNK_BYTES
from tests.collectives.sync_crew import SyncCrew


@pytest.fixture(scope="module")
def crew() -> Iterator[SyncCrew]:
    made = SyncCrew()
    yield made
    made.close()


def test_founders_become_equal_and_the_astray_one_is_healed(crew: SyncCrew) -> None:
    members = crew.play("healing", members=3, founders=3)
    first, equal, again = zip(*members, strict=True)
    for reports in (first, equal, again):
        assert len({report["digest"] for report in reports} | {report["winner"] for report in reports}) == 1
    assert sum(report["healed"] for report in first) == 2
    assert not any(report["rounds"] or report["healed"] for report in equal)
    assert sorted(report["bytes_received"] for report in again) == [0, 0, CHUNK_BYTES]
    (healed,) = [report for report in again if report["healed"]]
    assert healed["keys_changed"] == ["optimizer/param_groups/0/lr", "w"]
    assert healed["created"] == []


def test_one_survivor_is_not_outvoted_by_newcomers(crew: SyncCrew) -> None:
    members = crew.play("survivor", members=5, founders=2)
    assert members.count(None) == 1
    alive = [member for member in members if member is not None]
    assert {report["digest"] for report, _ in alive} == {trained for _, trained in alive}
    assert sum(report["healed"] for report, _ in alive) == 3
    assert all(len(report["voters"]) == 1 for report, _ in alive)


def test_another_giver_takes_over_when_one_is_killed_in_a_transfer(crew: SyncCrew) -> None:
    members = crew.play("giver_dies", members=3, founders=3)
    assert members.count(None) == 1
    alive = [member for member in members if member is not None]
    assert {report["digest"] for report, _ in alive} == {right for _, right in alive}
    assert all(len(report["lost"]) == 1 for report, _ in alive)
    (taker,) = [report for report, _ in alive if report["healed"]]
    assert taker["bytes_received"] == 12 * CHUNK_BYTES


def test_two_veterans_that_differ_are_told_where(crew: SyncCrew) -> None:
    members = crew.play("diverged", members=2, founders=2)
    assert members == [["StateDiverged", ["model/0.bias"], True]] * 2
