"""Writers that are killed while they save: earlier steps stay whole, and survivors finish or say what is lost."""

from pathlib import Path

import pytest

from checkpoint.gc import gc
from checkpoint.loading import load_state
from checkpoint.saving import save
from checkpoint.store import Store
from checkpoint.verify import verify
from collectives.state import state_hash
from tests.checkpoint.save_programs import fails, saves, saves_again, whole
from tests.harness.cluster import Cluster


def proven(url: Path) -> list[int]:
    """The steps of a store, every byte of which is right."""
    with Store(url) as store:
        report = verify(store, store.steps())
        assert not report.damages
        return list(report.steps)


@pytest.mark.parametrize(
    ("stage", "victim"), [("writing", 2), ("written", 1), ("publishing", 0), ("published", 0), ("beginning", 0)]
)
def test_survivors_finish_what_they_hold_replicas_of(tmp_path: Path, stage: str, victim: int) -> None:
    save(tmp_path, {"old": whole(1)["w"]}, step=1)
    with Cluster(founders=4) as cluster:
        peers = cluster.peers(saves, 4, url=str(tmp_path), kind="pairs", world=4, step=2, victim=victim, stage=stage)
        endings = [peer.ending() for peer in peers]
        assert [ending.signal for ending in endings].count(9) == 1
        dead = next(peer for peer in peers if peer.ending().signal)
        assert dead.expect("dying")["stage"] == stage
        alive = [ending.value for ending in endings if not ending.signal]
    assert len(alive) == 3
    assert all(report["lost"] == [victim] for report in alive)
    assert proven(tmp_path) == [1, 2]
    loaded = load_state(tmp_path)
    assert state_hash({key: loaded[key] for key in whole(2)}) == state_hash(whole(2))
    with Store(tmp_path) as store:
        report = gc(store)
        assert not report.running
        needed = set(store.manifest(1).packs) | set(store.manifest(2).packs)
        assert set(store.packs()) == needed
        assert store.storage.names("saves") == []


@pytest.mark.parametrize(("stage", "left"), [("writing", 2), ("beginning", 1)])
def test_what_only_the_dead_held_is_named_and_nothing_appears(tmp_path: Path, stage: str, left: int) -> None:
    save(tmp_path, {"old": whole(1)["w"]}, step=1)
    with Cluster(founders=3) as cluster:
        peers = cluster.peers(saves, 3, url=str(tmp_path), kind="rows", world=3, step=2, victim=1, stage=stage)
        endings = [peer.ending() for peer in peers]
        dead = [peer for peer, ending in zip(peers, endings, strict=True) if ending.signal == 9]
        assert len(dead) == 1
        assert dead[0].expect("dying")["stage"] == stage
    errors = [ending for ending in endings if not ending.signal]
    assert [ending.error for ending in errors] == ["MemberLost"] * 2
    assert all("ranks [1] were lost" in e.message and "w, v, b" in e.message for e in errors)
    assert proven(tmp_path) == [1]
    with Store(tmp_path) as store:
        assert len(store.packs()) == left, "the pack of the dead is left over"
        assert len(gc(store).packs) == left - 1
    assert proven(tmp_path) == [1]


def test_after_a_loss_the_survivors_save_by_another_layout(tmp_path: Path) -> None:
    with Cluster(founders=3) as cluster:
        endings = [peer.ending() for peer in cluster.peers(saves_again, 3, url=str(tmp_path), world=3, victim=1)]
    assert [ending.signal for ending in endings].count(9) == 1
    alive = [ending.value for ending in endings if not ending.signal]
    assert alive == [{"tries": 2, "size": 2, "lost": []}] * 2, "rank and size follow the loss"
    assert proven(tmp_path) == [2]
    loaded = load_state(tmp_path)
    assert state_hash({key: loaded[key] for key in whole(2)}) == state_hash(whole(2))


def test_a_full_disk_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    save(tmp_path, {"old": whole(1)["w"]}, step=1)
    with Cluster(founders=3) as cluster:
        endings = [peer.ending() for peer in cluster.peers(fails, 3, url=str(tmp_path), world=3, victim=2)]
    assert {ending.error for ending in endings} == {"StorageFailed"}
    assert all("No space left on device" in ending.message for ending in endings)
    assert sum("rank 2 cannot save" in ending.message for ending in endings) == 2
    assert proven(tmp_path) == [1]
    with Store(tmp_path) as store:
        assert len(store.packs()) == 1, "whoever lives cleans up"
