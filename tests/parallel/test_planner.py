"""The planner: what is best by hand or by trying everything, memory, pins, ties, and what it finds by itself."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from collectives.errors import UsageError
from parallel.bound import Bound
from parallel.capturing import Step, capture
from parallel.cost import Costs
from parallel.graph import Graph, Phase, Role
from parallel.layout import Broadcast, Mesh, Partial, Split
from parallel.machine import CPU
from parallel.models.examples import example
from parallel.planner import NoPlan, Search, plan, plans
from parallel.plans import Placements, Plan
from parallel.program import cheapest, price
from parallel.tables import size
from tests.parallel.brute import Brute, window

LIGHT = msgspec.structs.replace(CPU, launch=6e-5)
"""Ranks to which a collective is cheaper than to ours."""
SLOW = msgspec.structs.replace(LIGHT, flops=2e7, bandwidth=2e8, kernel=0.0)
"""Ranks so slow that even tiny operations are worth sharding."""
FOUR = Mesh.of(x=4)
B = (Broadcast(),)
MEMORY_CASES = [("mlp", 7, 5, 0.9), ("mlp", 14, 5, 0.9), ("mlp", 14, 5, 0.7)]


def step(model: Callable[[], nn.Module], loss: Any, batch: Any, optimizer: Callable[..., Optimizer] = AdamW) -> Step:
    with torch.device("meta"):
        built, example_batch = model(), batch()
    return capture(loss, built, optimizer(built.parameters(), lr=1e-3), example_batch)


def mlp(batch: int, hidden: int, optimizer: Callable[..., Optimizer] = SGD) -> Step:
    def make(parameters: Any) -> Optimizer:
        return optimizer(parameters, lr=0.1)

    return example("mlp", batch, hidden=hidden, optimizer=make).capture()


def sent(found: Plan) -> list[tuple[str, str, int]]:
    """Kind, phase and bytes of each collective but the loss's."""
    return [(r.boxing.kind, str(r.phase), r.nbytes) for r in found.collectives if r.value.shape]


def split(found: Plan, name: str) -> str:
    return ",".join(map(str, found.layouts[name].placements))


def test_a_large_batch_is_data_parallel() -> None:
    found = plan(mlp(1024, 128), FOUR)
    all_reduce = 2 * 3 * 128 * 128 * 4
    assert sum(nbytes for _, _, nbytes in sent(found)) == 2 * all_reduce
    gradients = {output.value.name for output in found.graph.outputs if output.role == Role.GRADIENT}
    assert {r.value.name for r in found.collectives if r.value.shape} == gradients
    assert {phase for _, phase, _ in sent(found)} == {"backward"}
    assert split(found, "batch") == "S(0)"
    assert found.figures is not None
    assert found.figures.gap < 1e-6
    assert found.figures.bound <= found.figures.time * (1 + 1e-6)


def test_a_wide_layer_is_tensor_parallel() -> None:
    found = plan(mlp(128, 1024), FOUR)
    assert sent(found) == [("all_reduce", "forward", 2 * 3 * 128 * 1024 * 4)]
    assert [split(found, name) for name in ("up.weight", "down.weight", "batch")] == ["S(0)", "S(1)", "B"]


def test_adam_is_sharded_as_zero_does() -> None:
    found = plan(mlp(2048, 128, AdamW), FOUR, machine=LIGHT)
    for name in ("up", "down"):
        assert split(found, f"{name}.weight.exp_avg").startswith("S")
        assert split(found, f"{name}.weight.exp_avg_sq").startswith("S")
    kinds = sorted(kind for kind, _, _ in sent(found))
    assert kinds == ["all_gather", "all_gather", "reduce_scatter", "reduce_scatter"]
    assert sum(nbytes for _, _, nbytes in sent(found)) == 2 * 2 * 3 * 128 * 128 * 4


class Block(nn.Module):
    """A norm and a feed-forward block around which the input is added."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden))
        self.up = nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.scale
        out: Tensor = x + self.down(F.relu(self.up(normed)))
        return out


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return (out * out).sum()


def test_columns_then_rows_and_norms_in_parallel_along_tokens() -> None:
    def blocks() -> nn.Module:
        return nn.Sequential(Block(512, 4096), Block(512, 4096))

    found = plan(step(blocks, squares, lambda: torch.empty(512, 512)), FOUR)
    for at in (0, 1):
        assert split(found, f"{at}.up.weight") == "S(0)"
        assert split(found, f"{at}.down.weight") == "S(1)"
    norms = [
        sharding.outputs[0]
        for node, sharding in zip(found.graph.nodes, found.nodes, strict=True)
        if node.op.startswith("aten.rsqrt")
    ]
    assert norms[1] == (Split(0),)
    forward = [r.boxing.kind for r in found.collectives if r.phase == Phase.FORWARD and r.value.nbytes == 512 * 512 * 4]
    assert forward[:2] == ["reduce_scatter", "all_gather"]


class Head(nn.Module):
    def __init__(self, hidden: int, words: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def test_a_large_vocabulary_is_split_and_so_is_the_loss() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    batch = lambda: (torch.empty(256, 256), torch.empty(256, dtype=torch.long))  # noqa: E731
    found = plan(step(lambda: Head(256, 32768), loss, batch), FOUR)
    assert split(found, "head.weight") == "S(0)"
    assert max(nbytes for _, _, nbytes in sent(found)) <= 2 * 3 * 256 * 256 * 4  # nothing of the size of the logits
    maxima = [r for r in found.collectives if r.before.placements == (Partial("max"),)]
    assert [r.value.size for r in maxima] == [256]


def test_experts_are_divided() -> None:
    found = plan(example("mixtral", 16, length=64).capture(), FOUR, machine=SLOW)
    for layer in (0, 1):
        for name in ("gate", "up", "down"):
            assert split(found, f"layers.{layer}.mlp.{name}") == "S(0)"
    assert "all_to_all" in {kind for kind, _, _ in sent(found)}


@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize(("name", "first", "count"), [("mlp", 7, 8), ("mlp", 12, 8), ("gpt", 0, 5), ("gpt", 28, 5)])
def test_small_graphs_are_planned_as_well_as_by_trying_everything(
    name: str, first: int, count: int, parts: int
) -> None:
    graph = window(_graph(name), first, count)
    _compare(graph, Mesh.of(x=parts), None)


@pytest.mark.parametrize(("name", "first", "count"), [("mlp", 0, 3), ("mixtral", 0, 2), ("gpt", 56, 2)])
def test_meshes_of_two_axes_are_planned_as_well_as_by_trying_everything(name: str, first: int, count: int) -> None:
    _compare(window(_graph(name), first, count), Mesh.of(a=2, b=2), None)


@pytest.mark.parametrize(("name", "first", "count", "share"), MEMORY_CASES)
def test_memory_is_kept_as_well_as_by_trying_everything(name: str, first: int, count: int, share: float) -> None:
    graph = window(_graph(name), first, count)
    free = plan(graph, FOUR, machine=SLOW).figures
    assert free is not None
    _compare(graph, FOUR, share * free.memory)


def _graph(name: str) -> Graph:
    made = example("mlp", 12, hidden=8) if name == "mlp" else example(name, 4)
    return made.capture().graph


def _compare(graph: Graph, mesh: Mesh, memory: float | None) -> None:
    costs = Costs(mesh, SLOW)
    found = plan(graph, mesh, memory, machine=SLOW).figures
    assert found is not None
    brute = Brute(graph, costs, found.time + 1e-7, memory)
    assert brute.best() == pytest.approx(found.time, abs=2e-8)
    assert brute.tried > 0
    assert memory is None or found.memory <= memory


@pytest.mark.parametrize(("batch", "hidden"), [(64, 256), (512, 64)])
def test_a_memory_limit_is_kept_at_a_price(batch: int, hidden: int) -> None:
    captured = mlp(batch, hidden)
    free = plan(captured, FOUR, machine=LIGHT).figures
    assert free is not None
    tight = plan(captured, FOUR, memory=0.9 * free.memory, machine=LIGHT).figures
    assert tight is not None
    assert tight.memory <= 0.9 * free.memory
    assert tight.time > 1.1 * free.time
    with pytest.raises(NoPlan, match="keeps within 1000 bytes a rank"):
        plan(captured, FOUR, memory=1000)


@pytest.mark.parametrize("batch", [128, 1024])
def test_second_copies_are_priced_as_well_as_by_trying_every_placement(batch: int) -> None:
    captured, costs, times = mlp(batch, 64), Costs(FOUR, SLOW, redundancy=1), []
    able: list[Placements] = [B, (Split(0),), (Split(1),)]
    for up, down in itertools.product(able, able):
        figures = plan(captured, FOUR, machine=SLOW, pins={"up.weight": up, "down.weight": down}).figures
        assert figures is not None
        copying = sum(costs.refresh(captured.graph.named[f"{n}.weight"], p) for n, p in (("up", up), ("down", down)))
        assert bool(copying) == (up != B or down != B)
        times.append(figures.time + copying)
    found = plan(captured, FOUR, machine=SLOW, redundancy=1).figures
    assert found is not None
    assert found.time == pytest.approx(min(times), rel=1e-6)


def test_second_copies_count_in_memory_and_as_bytes() -> None:
    captured = mlp(16, 256)
    limit = 2 * 256 * 256 * 4  # what the parameters take whole: they have to be split
    with pytest.raises(NoPlan):
        plan(captured, FOUR, 0.8 * limit, machine=LIGHT, redundancy=1)
    alone, twice = (plan(captured, FOUR, (0.8, 1.0)[r] * limit, machine=LIGHT, redundancy=r) for r in (0, 1))
    assert alone.replicas == ()
    assert {copy.source.name for copy in twice.replicas} <= {"up.weight", "down.weight"}
    held = sum(math.prod(copy.layout.shard((256, 256), 0).shape) * 4 for copy in twice.replicas)
    assert alone.figures is not None
    assert twice.figures is not None
    assert "second copies" not in alone.figures.at_peak
    assert twice.figures.at_peak["second copies"] == held > 0
    assert twice.figures.memory <= limit
    assert twice.figures.copying > 0
    assert twice.to_json()["second_copies"] == {
        "tensors": [copy.source.name for copy in twice.replicas],
        "bytes": 256 * 256 * 4 * len(twice.replicas),
        "memory": held,
    }
    assert f"second copies       {size(held)} a rank" in twice.explain()


def test_equal_layers_tied_cost_no_more_than_each_planned_by_itself() -> None:
    captured = example("gpt", 64).capture()
    tied, untied = plan(captured, FOUR, machine=LIGHT), plan(captured, FOUR, machine=LIGHT, tied=False)
    assert tied.figures is not None
    assert untied.figures is not None
    assert tied.figures.tied
    assert not untied.figures.tied
    assert tied.figures.time == pytest.approx(untied.figures.time, rel=0.01)
    assert untied.figures.time <= tied.figures.time * (1 + 1e-6)


def test_pins_are_honoured_and_cost() -> None:
    captured = mlp(1024, 128)
    best = plan(captured, FOUR)
    pinned = plan(captured, FOUR, pins={"up.weight": (Split(0),), "batch": B})
    assert split(pinned, "up.weight") == "S(0)"
    assert split(pinned, "batch") == "B"
    assert best.figures is not None
    assert pinned.figures is not None
    assert pinned.figures.time > best.figures.time


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"nonesuch": B}, "no tensor of that name"),
        ({"up.weight": (*B, *B)}, "lacks|needs as many"),
        ({"up.weight": (Split(2),)}, "cannot be so"),
        ({"up.weight": (Partial(),)}, "not partial"),
    ],
)
def test_pins_that_cannot_be_are_refused(pins: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(mlp(64, 16), FOUR, pins=pins)


def test_runners_up_come_in_order_and_differ() -> None:
    found = plans(mlp(1024, 128), FOUR, 4)
    times = [each.figures.time for each in found if each.figures is not None]
    assert len(times) == 4
    assert times == sorted(times)
    assert len({str(sorted((n, str(layout)) for n, layout in each.layouts.items())) for each in found}) == 4


def test_a_mesh_of_one_rank_sends_nothing() -> None:
    found = plan(mlp(64, 16), Mesh.of(x=1))
    assert found.collectives == ()


def test_a_large_mesh_of_two_axes_is_planned_axis_by_axis_and_says_so() -> None:
    captured = example("gpt", 8, layers=1).capture()
    found = plan(captured, Mesh.of(a=2, b=2), machine=SLOW)
    assert found.figures is not None
    assert found.figures.by_axis
    assert 0 <= found.figures.gap < 0.01
    assert found.figures.bound == pytest.approx((1 - found.figures.gap) * found.figures.time)
    line = plan(captured, FOUR, machine=SLOW)
    assert line.figures is not None
    assert found.figures.time <= line.figures.time * 1.02


@pytest.mark.parametrize("mesh", [FOUR, Mesh.of(a=2, b=2)])
def test_the_dual_bound_rises_to_the_best_plan_and_never_above(mesh: Mesh) -> None:
    graph = window(_graph("mlp"), 0, 12)
    search = Search(graph, Costs(mesh, SLOW), {}, None, True, 20.0)
    best = search.best()[0].figures
    assert best is not None
    assert best.gap < 1e-6
    alone = {
        kind: np.array([price(search.classes, search.costs, kind, option) for option in every])
        for kind, every in search.all.items()
    }
    bound = Bound(search.costs, search.flows, search.all, alone)
    assert bound.value == pytest.approx(cheapest(search.all, search.classes, search.costs))
    before = 0.0
    for _ in range(40):
        bound.rise()
        assert before * (1 - 1e-9) <= bound.value <= best.time * (1 + 1e-9)
        before = bound.value
    assert bound.value >= 0.99 * best.time


def test_every_input_and_output_of_a_node_is_placed_and_every_change_is_paid() -> None:
    found = plan(example("gpt", 8).capture(), FOUR, machine=SLOW)
    for node, sharding in zip(found.graph.nodes, found.nodes, strict=True):
        assert len(sharding.inputs) == len(node.inputs)
        assert len(sharding.outputs) == len(node.outputs)
    for output, placed in zip(found.graph.outputs, found.ends, strict=True):
        if output.role in {Role.PARAMETER, Role.STATE}:
            assert placed == found.layouts[output.name].placements
    assert found.figures is not None
    costs = Costs(FOUR, SLOW)
    talk = sum(costs.reshard(r.value, r.boxing) for r in found.reshards)
    assert found.figures.communication == pytest.approx(talk)
