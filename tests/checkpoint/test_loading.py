"""What a load refuses, converts and leaves alone; saves in the background; how much memory a load takes."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import background
from checkpoint.background import save_async
from checkpoint.holdings import Sharded
from checkpoint.loading import LoadOptions, load, load_state
from checkpoint.manifest import Chunk
from checkpoint.reader import GAP, bursts
from checkpoint.saving import SaveOptions, Saving, save
from collectives.errors import (
    CorruptChunk,
    LayoutMismatch,
    NoCheckpoint,
    OperationTimeout,
    OptionError,
    StorageFailed,
    UsageError,
)
from parallel.layout import Flat, Layout, Mesh, Partial, Split
from tests.checkpoint.crews import loaded


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store with one step."""
    save(
        tmp_path, {"m": {"w": torch.arange(24.0).reshape(4, 6), "b": torch.arange(3)}, "lr": 0.5, "tags": ["x"]}, step=4
    )
    return tmp_path


def into(**changes: Any) -> dict[str, Any]:
    """A state to be filled."""
    state: dict[str, Any] = {
        "m": {"w": torch.zeros(4, 6), "b": torch.zeros(3, dtype=torch.int64)},
        "lr": 0.0,
        "tags": [],
    }
    for key, value in changes.items():
        state["m"][key] = value
    return state


def test_all_names_that_do_not_fit_are_listed_at_once_and_nothing_is_touched(place: Path) -> None:
    state = into(w=torch.zeros(6, 4), extra=torch.ones(2))
    del state["m"]["b"]
    state["epoch"] = 3
    with pytest.raises(LayoutMismatch) as caught:
        load(place, state)
    error = caught.value
    assert (error.missing, error.unexpected, error.mismatched) == (("m/extra", "epoch"), ("m/b",), ("m/w",))
    assert "mismatched: m/w (shape (4, 6) in the checkpoint, (6, 4) here)" in str(error)
    assert state["lr"] == 0.0
    assert not state["m"]["w"].any()


def test_not_strict_fills_what_fits(place: Path) -> None:
    state = into(extra=torch.ones(2))
    del state["m"]["b"]
    report = load(place, state, options=LoadOptions(strict=False))
    assert (report.missing, report.unexpected, report.tensors) == (("m/extra",), ("m/b",), 1)
    assert state["m"]["w"].sum() == sum(range(24))
    assert (state["lr"], state["tags"]) == (0.5, ["x"])
    with pytest.raises(LayoutMismatch, match="m/w"):
        load(place, into(w=torch.zeros(5)), options=LoadOptions(strict=False))


def test_views_and_parameters_are_filled_in_place_and_dicts_are_kept(place: Path) -> None:
    base = torch.zeros(6, 8)
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=True)
    state = into(w=base.t()[2:6, :])
    inner, tags = state["m"], state["tags"]
    load(place, state)
    assert torch.equal(base.t()[2:6], torch.arange(24.0).reshape(4, 6))
    assert not base[:, :2].any()
    assert state["m"] is inner
    assert state["tags"] is tags == ["x"]
    save(place, {"p": parameter.detach() + 2}, step=5)
    version = parameter._version
    load(place, {"p": parameter})
    assert parameter.tolist() == [2.0] * 3
    assert parameter._version > version, "autograd knows"


def test_floats_are_converted_on_request_only(place: Path) -> None:
    state = into(w=torch.zeros(4, 6, dtype=torch.bfloat16))
    with pytest.raises(LayoutMismatch, match="F32 in the checkpoint, BF16 here; load with cast=True"):
        load(place, state)
    load(place, state, options=LoadOptions(cast=True))
    assert torch.equal(state["m"]["w"], torch.arange(24.0).reshape(4, 6).bfloat16())
    with pytest.raises(LayoutMismatch, match="I64 in the checkpoint, F32 here"):
        load(place, into(b=torch.zeros(3)), options=LoadOptions(cast=True))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC0ABCD, 0xFFC00001, 0x80000000])
def test_every_bit_of_a_nan_is_kept(tmp_path: Path, bits: int) -> None:
    odd = torch.tensor([bits - (1 << 32) if bits >> 31 else bits] * 9, dtype=torch.int32).view(torch.float32)
    save(tmp_path, {"x": odd})
    strided = torch.zeros(18)[::2]
    load(tmp_path, {"x": strided})
    assert set(strided.contiguous().view(torch.int32).tolist()) == set(odd.view(torch.int32).tolist())


def test_targets_that_cannot_be_filled_are_refused_by_name(place: Path) -> None:
    mesh = Mesh.of(x=2)
    for layout, words in (
        ({"m/w": Layout(mesh, (Partial(),))}, "is partial"),
        ({"m/w": Sharded(Layout(mesh, (Flat(),)), (24,))}, r"shape \(4, 6\) in the checkpoint, \(24,\) here"),
        ({"m/w": Layout(mesh, (Split(2),))}, "needs a dimension 2"),
        ({"m/w": Layout(Mesh((("x", 1),), (7,)), (Split(0),))}, "rank 0 is not on mesh"),
    ):
        with pytest.raises(LayoutMismatch, match=words):
            load(place, into(), layout)
    with pytest.raises(LayoutMismatch, match="what no rank has") as caught:
        load(place, into(), {"m": Layout.single(), "w": Layout.single()})
    assert caught.value.missing == ("w",)
    with pytest.raises(LayoutMismatch, match="share one place in memory"):
        load(place, into(w=torch.zeros(1, 6).expand(4, 6)))
    with pytest.raises(UsageError, match="is on device meta"):
        save(place, {"x": torch.zeros(1, device="meta")})


def test_a_misfit_of_one_rank_is_told_to_all(place: Path) -> None:
    outcomes = loaded(str(place), [into(), into(w=torch.zeros(2))], None)
    assert all(isinstance(outcome, LayoutMismatch) and outcome.mismatched == ("m/w",) for outcome in outcomes)
    outcomes = loaded(str(place / "no"), [into(), into()], None)
    assert [type(outcome) for outcome in outcomes] == [NoCheckpoint, NoCheckpoint]
    (file,) = (place / "packs").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    wanted = [into(), into()]
    del wanted[0]["m"]["b"]  # which the last chunk is of
    outcomes = loaded(str(place), wanted, None)
    assert [type(outcome) for outcome in outcomes] == [CorruptChunk, CorruptChunk]
    assert "rank 1 cannot load: chunk " in str(outcomes[0])


def test_bursts_are_few_and_bounded() -> None:
    chunks = [Chunk(f"{n:064x}", 1000, n // 50, (n % 50) * 1000 + (GAP + 1) * (n % 50 >= 25), 1000) for n in range(100)]
    found = bursts(chunks, 10_000)
    assert sum(len(burst.chunks) for burst in found) == 100
    assert all(burst.length <= 10_000 for burst in found)
    assert len(found) == 12
    assert len(bursts(chunks, 1 << 20)) == 4
    assert [burst.length for burst in bursts(chunks[:1], 10)] == [1000], "a chunk is read whole"


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"memory": 1}, {"threads": -1}):
        with pytest.raises(OptionError):
            LoadOptions(**wrong)  # type: ignore[arg-type]
    for wrong in ({"level": 40}, {"threads": -1}, {"round_bytes": 0}):
        with pytest.raises(OptionError):
            SaveOptions(**wrong)


def test_an_error_in_the_background_is_raised_by_the_next_call_or_by_wait(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    state = {"x": torch.ones(5)}
    save_async(file / "store", state)
    with pytest.raises(StorageFailed, match="Not a directory"):
        save_async(tmp_path / "s", state)
    assert not (tmp_path / "s").exists(), "it was not begun"
    handle = save_async(file / "store", state)
    with pytest.raises(StorageFailed):
        handle.wait()
    assert save_async(tmp_path / "s", state, step=3).wait().step == 3
    assert load_state(tmp_path / "s")["x"].tolist() == [1.0] * 5


def test_a_later_save_waits_its_turn_and_the_copy_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = threading.Event(), threading.Event()
    run = Saving.run

    def slow(self: Saving, *given: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return run(self, *given)

    monkeypatch.setattr(Saving, "run", slow)
    state = {"x": torch.zeros(1000), "t": torch.zeros(3).expand(3)}
    first = save_async(tmp_path, state, step=1)
    assert begun.wait(60)
    with pytest.raises(OperationTimeout, match="wait again"):
        first.wait(0.01)
    copies = dict(background._background._copies)
    state["x"].fill_(2)
    second: list[Any] = []
    thread = threading.Thread(target=lambda: second.append(save_async(tmp_path, state, step=2)))
    thread.start()
    thread.join(0.2)
    assert not second, "the second call waits for the first save"
    gate.set()
    thread.join(60)
    assert second[0].wait().step == 2
    assert first.done()
    assert all(background._background._copies[key] is copy for key, copy in copies.items())
    assert load_state(tmp_path, step=1)["x"].unique().tolist() == [0.0]
    assert load_state(tmp_path, step=2)["x"].unique().tolist() == [2.0]
