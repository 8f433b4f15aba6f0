"""Random states saved by random layouts and loaded by others, through the store; chunks do not depend on the layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint.holdings import Sharded
from checkpoint.loading import LoadReport, load_state
from checkpoint.reader import Reader
from checkpoint.saving import SaveReport
from collectives.errors import LayoutMismatch, RingholdError, UsageError
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Split
from tests.checkpoint.crews import loaded, saved

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random values of any dtype."""
    chance = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=chance) < 0.5
    if dtype is torch.int64:
        return torch.randint(-(10**12), 10**12, shape, generator=chance)
    return torch.randn(shape, generator=chance).to(dtype)


def shard_of(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    """What a rank holds, by torch's own slicing."""
    shard = layout.shard(tuple(whole.shape), rank)
    box = whole[tuple(slice(a, b) for a, b in zip(shard.box.start, shard.box.stop, strict=True))]
    return box.clone() if shard.whole else box.reshape(-1)[shard.start : shard.stop].clone()


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*raw)


@st.composite
def layouts_on(draw: st.DrawFn, world: int, dims: int) -> Layout:
    """Any layout without partial values on all or some ranks of a world."""
    sizes = [(world,), (world // 2, 2)] if world > 2 and world % 2 == 0 else [(world,)]
    shape = draw(st.sampled_from(sizes))
    ranks = draw(st.permutations(range(world)))[: math.prod(shape)]
    choices: list[st.SearchStrategy[Placement]] = [st.just(Broadcast()), st.just(Flat())]
    if dims:
        choices.append(st.builds(Split, st.integers(0, dims - 1)))
    axes = tuple((f"a{index}", size) for index, size in enumerate(shape))
    return Layout(Mesh(axes, tuple(ranks)), tuple(draw(st.one_of(choices)) for _ in axes))


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], int, int, list[dict[str, Layout]]]:
    worlds = draw(st.sampled_from([(4, 3), (3, 4), (1, 4), (4, 1), (2, 5), (4, 2)]))
    tensors = {}
    for index in range(draw(st.integers(1, 3))):
        shape = draw(
            st.sampled_from([(), (1,), (0, 4), (3, 5), (37,), (20, 300), (130, 90, 2), (9, 1, 2000), (70_001,)])
        )
        tensors[f"t{index}"] = (shape, draw(st.sampled_from(DTYPES)))
    by_world = [{key: draw(layouts_on(world, len(shape))) for key, (shape, _) in tensors.items()} for world in worlds]
    return tensors, *worlds, by_world


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases())
def test_any_layout_to_any_other(case: Any) -> None:
    tensors, before, after, (old, new) = case
    url = f"memory://reshard-{abs(hash(str(case)))}"
    wholes = {key: fresh(shape, dtype, number) for number, (key, (shape, dtype)) in enumerate(tensors.items())}

    def states(world: int, layouts: dict[str, Layout], empty: bool) -> list[Any]:
        return [
            {
                key: torch.zeros_like(shard) if empty else shard
                for key, whole in wholes.items()
                if rank in layouts[key].mesh.ranks
                for shard in [shard_of(whole, layouts[key], rank)]
            }
            for rank in range(world)
        ]

    placed = {key: Sharded(layout, tuple(wholes[key].shape)) for key, layout in old.items()}
    reports = saved(url, states(before, old, False), placed, round_bytes=4096)
    assert all(isinstance(report, SaveReport) for report in reports), reports
    targets = states(after, new, True)
    filled = loaded(url, targets, new)
    assert all(isinstance(report, LoadReport) for report in filled), filled
    for wanted, got in zip(states(after, new, False), targets, strict=True):
        assert wanted.keys() == got.keys()
        assert all(same(wanted[key], got[key]) for key in wanted)

    saved(url, [wholes], None, step=1)
    with Reader(url, 0) as one, Reader(url, 1) as other:
        for key in wholes:
            digests = [[r.manifest.chunks[i].digest for i in r.tensors[key].chunks] for r in (one, other)]
            assert digests[0] == digests[1], "chunks follow from the tensor alone"
    again = saved(url, [wholes], None, step=2)[0]
    assert isinstance(again, SaveReport)
    assert again.written.raw == 0, "nothing is written twice"


@pytest.mark.parametrize("op", ["sum", "avg", "min", "max", "prod"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_partial_values_are_reduced_on_the_way(tmp_path: Path, op: str, dtype: torch.dtype) -> None:
    mesh = Mesh.of(dp=2, tp=2)
    layout = Layout.by_axis(mesh, dp=Partial(op), tp=Split(0))
    terms = [fresh((5, 3), dtype, seed) // (1 if dtype.is_floating_point else 10**7) for seed in (1, 2)]
    states = [{"g": shard_of(terms[rank // 2], layout, rank)} for rank in range(4)]
    assert all(isinstance(report, SaveReport) for report in saved(str(tmp_path), states, layout))
    exact = torch.stack(terms).double()
    wanted = {
        "sum": exact.sum(0),
        "avg": exact.mean(0).trunc() if dtype is torch.int64 else exact.mean(0),
        "min": exact.amin(0),
        "max": exact.amax(0),
        "prod": exact.prod(0),
    }[op]
    got = load_state(str(tmp_path))["g"]
    assert got.dtype is dtype
    # one rounding of two terms: half a unit in the last place of the result
    tolerance = 0.0 if dtype is torch.int64 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=0)


def test_partial_over_two_axes_reduces_the_outer_first(tmp_path: Path) -> None:
    layout = Layout(Mesh.of(a=2, b=2), (Partial("sum"), Partial("max")))
    values = [1.0, 5.0, 3.0, 2.0]
    saved(str(tmp_path), [{"x": torch.tensor([value])} for value in values], layout)
    assert load_state(str(tmp_path))["x"].item() == max(1.0 + 3.0, 5.0 + 2.0)


def test_replicas_are_written_once_and_shared_out_evenly(tmp_path: Path) -> None:
    state = {"w": fresh((1024, 512), torch.float32, 0), "v": fresh((512, 512), torch.float32, 1)}
    reports = saved(str(tmp_path), [state] * 4, None, level=0)
    good = [report for report in reports if isinstance(report, SaveReport)]
    assert len(good) == 4
    total = sum(tensor.nbytes for tensor in state.values())
    assert good[0].written.raw == total
    assert max(report.mine.raw for report in good) <= total / 4 * 1.05


def test_ranks_may_hold_different_layers(tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = [
        {"model": {f"layer{r}": fresh((4, 4), torch.float32, r)}, "rng": {r: r * 10}, "step": 7} for r in range(3)
    ]
    assert all(isinstance(report, SaveReport) for report in saved(str(tmp_path), layers, None))
    whole = load_state(str(tmp_path))
    assert sorted(whole["model"]) == ["layer0", "layer1", "layer2"]
    assert (whole["rng"], whole["step"]) == ({0: 0, 1: 10, 2: 20}, 7)
    targets: list[Any] = [{"model": {f"layer{2 - r}": torch.zeros(4, 4)}, "rng": {r: 0}, "step": 0} for r in range(3)]
    assert all(isinstance(report, LoadReport) for report in loaded(str(tmp_path), targets, None))
    assert same(targets[0]["model"]["layer2"], layers[2]["model"]["layer2"])
    assert targets[1]["rng"][1] == 10


def test_one_rank_of_eight_reads_an_eighth(tmp_path: Path) -> None:
    state = {"up": fresh((1024, 512), torch.bfloat16, 0), "down": fresh((512, 1024), torch.bfloat16, 1)}
    saved(str(tmp_path), [state], None, level=0)
    mesh = Mesh.of(tp=8)
    layouts = {"up": Layout(mesh, (Split(0),)), "down": Layout(mesh, (Split(1),))}
    targets = [{key: shard_of(state[key], layouts[key], r) * 0 for key in state} for r in range(8)]
    for report in loaded(str(tmp_path), targets, layouts):
        assert isinstance(report, LoadReport)
        assert report.read <= sum(tensor.nbytes for tensor in state.values()) / 8 * 1.02
    assert all(same(targets[r][k], shard_of(state[k], layouts[k], r)) for r in range(8) for k in state)


def test_contradictions_are_told_to_every_rank_by_name(tmp_path: Path) -> None:
    split = Layout(Mesh.of(tp=2), (Split(0),))
    flat = Layout(Mesh.of(tp=2), (Flat(),))
    good = torch.zeros(2, 3)

    def refused(states: list[Any], layouts: Any, kind: type[RingholdError], *words: str) -> None:
        outcomes = saved(str(tmp_path), states, layouts)
        assert any(isinstance(outcome, kind) for outcome in outcomes)
        for outcome in outcomes:
            assert isinstance(outcome, RingholdError)
            assert all(word in str(outcome) for word in words), str(outcome)
        assert not list(tmp_path.rglob("*.pack")) and not list(tmp_path.rglob("steps/*"))

    refused([{"w": good}, {"w": good.double()}], split, LayoutMismatch, "w", "F32 on rank 0, F64 on rank 1")
    refused([{"w": good}, {"w": torch.zeros(5, 3)}], Sharded(split, (6, 3)), LayoutMismatch, "rank 0 has (3, 3)")
    refused([{"w": good}, {}], split, LayoutMismatch, "rank 1 is on mesh", "does not have it")
    refused([{"w": good}, {"w": good}], flat, LayoutMismatch, "give the whole shape")
    refused([{"lr": 0.1, "w": good}, {"lr": 0.2, "w": good}], split, LayoutMismatch, "mismatched: lr")
    refused([{"w": good}, {"w": object()}], split, UsageError, "object")
    refused([{"w": good}] * 2, {"v": split, "w": split, "w/x": split}, LayoutMismatch, "missing: v", "missing: w/x")
    refused([{"w": good, "0": {0: good, "0": good}}] * 2, None, UsageError, "two tensors")


def test_layouts_go_by_the_longest_path() -> None:
    url = "memory://longest"
    mesh = Mesh.of(dp=2)
    whole = fresh((4, 4), torch.float32, 0)
    layouts: Any = {
        "": Layout.replicated(mesh),
        "model": Layout(mesh, (Split(0),)),
        "model/b": Layout(mesh, (Split(1),)),
    }
    states = [
        {"model": {"a": whole[2 * r : 2 * r + 2], "b": whole[:, 2 * r : 2 * r + 2]}, "other": whole} for r in range(2)
    ]
    assert all(isinstance(report, SaveReport) for report in saved(url, states, layouts))
    read = load_state(url)
    assert all(same(tensor, whole) for tensor in (read["model"]["a"], read["model"]["b"], read["other"]))
