"""Saving and loading on peers that are processes: other numbers of them, other layouts, and in the background."""

from pathlib import Path

from checkpoint.loading import load_state
from checkpoint.store import Store
from tests.checkpoint.save_programs import loads, passes_on, saves, saves_in_background
from tests.harness.cluster import Cluster


def test_four_replicas_become_three_flat_shards_then_two_of_rows(tmp_path: Path) -> None:
    url = str(tmp_path)
    with Cluster(founders=4) as cluster:
        reports = cluster.run(saves, 4, url=url, kind="replicated", world=4, step=1)
    total = 4 * (600 * 500 + 257 * 33 + 9)
    assert all(report["raw"] == total for report in reports)
    assert max(report["mine"] for report in reports) < total / 2
    with Cluster(founders=3) as cluster:
        assert len(set(cluster.run(passes_on, 3, url=url, kinds=["replicated", "flat"], world=3, step=2))) == 1
    with Cluster(founders=2) as cluster:
        assert cluster.run(loads, 2, url=url, kind="rows", world=2, step=1) == ["equal"] * 2
    with Store(url) as store:
        assert store.manifest(1).packs == store.manifest(2).packs, "the second save found every chunk there"


def test_saves_in_the_background_take_turns_and_keep_what_was_then(tmp_path: Path) -> None:
    with Cluster(founders=2) as cluster:
        assert cluster.run(saves_in_background, 2, url=str(tmp_path), world=2, steps=3) == [[0, 1, 2]] * 2
    for step in range(3):
        state = load_state(tmp_path, step=step)
        assert state["step"] == step
        assert state["x"].unique().tolist() == [step]
