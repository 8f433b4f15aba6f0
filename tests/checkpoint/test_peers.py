"""Loading from the memory of other ranks, and from files what they do not have or have no longer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.holdings import Sharded
from checkpoint.loading import LoadReport
from checkpoint.peers import Offer
from checkpoint.saving import save
from collectives.errors import RingholdError, StorageFailed
from parallel.layout import Flat, Layout, Mesh, Split
from tests.checkpoint.crews import loaded

ROWS = Layout(Mesh((("x", 2),), (0, 1)), (Split(0),))
COLUMNS = Layout(Mesh.of(x=3), (Split(1),))
FLAT = Layout(Mesh((("x", 2),), (1, 0)), (Flat(),))


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Tensor]:
    """What was saved: at `tmp_path`."""
    chance = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(300, 400, generator=chance), "v": torch.randn(70_001, generator=chance)}
    save(tmp_path, {**state, "step": 9})
    return state


def offers(whole: dict[str, Tensor]) -> list[Offer | None]:
    """Ranks 0 and 1 of three have halves; rank 2 is new."""
    layouts: dict[str, Layout | Sharded] = {"w": ROWS, "v": Sharded(FLAT, (70_001,))}
    halves = whole["v"].tensor_split(2)
    return [
        *(Offer({"w": whole["w"][150 * r : 150 * r + 150], "v": halves[1 - r].clone()}, layouts) for r in range(2)),
        None,
    ]


def targets() -> list[Any]:
    """Columns of one, all of the other, on three ranks."""
    return [
        {"w": torch.zeros(300, len(part)), "v": torch.zeros(70_001), "step": 0}
        for part in torch.arange(400).tensor_split(3)
    ]


def check(filled: list[Any], whole: dict[str, Tensor]) -> None:
    assert torch.equal(torch.cat([state["w"] for state in filled], 1), whole["w"])
    assert all(torch.equal(state["v"], whole["v"]) and state["step"] == 9 for state in filled)


def good(outcomes: list[LoadReport | RingholdError]) -> list[LoadReport]:
    assert all(isinstance(outcome, LoadReport) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, LoadReport)]


def test_what_peers_have_is_read_from_no_file(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    shutil.rmtree(tmp_path / "packs")
    filled = targets()
    reports = good(loaded(str(tmp_path), filled, {"w": COLUMNS}, offers(whole), memory=8 << 20))
    check(filled, whole)
    assert all(report.read == 0 and report.from_peers > 70_001 * 4 for report in reports)
    with_files = loaded(str(tmp_path), filled, {"w": COLUMNS})
    assert all(isinstance(outcome, StorageFailed) for outcome in with_files), "there are no files"


def test_an_offer_that_changed_or_is_not_whole_leaves_the_rest_to_files(
    tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    given = offers(whole)
    assert given[0] is not None
    before = whole["w"].clone()
    whole["w"][10, 10] += 1  # which the offer shares: a chunk of it has other bytes now: all that is taken is proven
    filled = targets()
    reports = good(loaded(str(tmp_path), filled, {"w": COLUMNS}, given))
    check(filled, {**whole, "w": before})
    assert reports[0].read > 0
    assert reports[0].from_peers > 0
    alone = targets()
    reports = good(loaded(str(tmp_path), alone, {"w": COLUMNS}, [given[0], None, None]))
    check(alone, {**whole, "w": before})
    assert all(report.read > 0 for report in reports)
