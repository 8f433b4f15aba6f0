"""The integer program inside a stage: what it finds, that it means the same by a second as the formulas, its bounds."""

import json
from dataclasses import replace

import pytest

from launch import console
from launch.cli import ringhold
from parallel import stages as module
from parallel.cost import Costs
from parallel.explain import written
from parallel.graph import Phase
from parallel.layout import Mesh
from parallel.machine import CPU
from parallel.options import Options
from parallel.plans import Plan
from parallel.scale import Cluster, Strategy, Transformer
from parallel.scale.layer import Layers
from parallel.solver import Unsolved
from parallel.stage_costs import StageCosts
from parallel.stages import Stage, Stages, captured, solve


def layers_of(name: str, hardware: str = "h100", tp: int = 1, pp: int = 1, microbatch: int = 1) -> Layers:
    strategy = Strategy(batch=microbatch, tp=tp, pp=pp, microbatch=microbatch)
    return Layers(Transformer.load(name), strategy, Cluster.load(hardware))


def planned(layers: Layers) -> Stage:
    stage = Stages().of(layers)
    assert stage is not None
    assert stage.plan.figures is not None
    return stage


def held_weights(plan: Plan) -> int:
    pairs = zip(plan.graph.inputs, plan.starts, strict=True)
    return sum(Costs(plan.mesh, CPU).local_bytes(s.value, placed) for s, placed in pairs if "." in s.name)


def test_a_layer_of_gpt_is_divided_as_megatron_does_it() -> None:
    layers = layers_of("gpt3-175b", tp=8)
    stage = planned(layers)
    figures = stage.plan.figures
    assert figures is not None
    assert figures.gap < 1e-4
    placed = {name: written(layout.placements) for name, layout in stage.plan.layouts.items()}
    for name in ("attention.query", "attention.key", "attention.value", "mlp.up"):
        assert placed[f"{name}.weight"] == placed[f"{name}.bias"] == "S(0)"
    assert placed["attention.out.weight"] == placed["mlp.down.weight"] == "S(1)"
    assert placed["x"] == placed["batch"] == "S(1)"
    kinds = [reshard.boxing.kind for reshard in stage.plan.collectives if reshard.value.nbytes > 1e6]
    assert sorted(kinds) == ["all_gather"] * 4 + ["reduce_scatter"] * 4
    assert stage.gathered == []
    assert stage.time == pytest.approx(stage.formula_time, rel=1e-4)


@pytest.mark.parametrize(("name", "hardware", "tp"), [("gpt3-175b", "a100", 8), ("llama3-70b", "h100", 4)])
def test_the_program_means_the_same_by_a_second_as_the_formulas(name: str, hardware: str, tp: int) -> None:
    layers = layers_of(name, hardware, tp=tp)
    stage, formula = planned(layers), layers.layer()
    # The graph has keys, queries and values apart and adds their gradients up; the formulas have them in one product.
    assert stage.formula_forward == pytest.approx(formula.forward.total, rel=0.03)
    assert stage.formula_backward == pytest.approx(formula.backward.total, rel=0.04)


def test_small_weights_are_gathered_where_activations_are_larger() -> None:
    layers = layers_of("llama3-8b", tp=8, microbatch=2)
    stage = solve(layers, captured(layers.model, 2, layers.model.seq), seconds=120.0)  # of a busy machine, too
    assert stage.time < 0.97 * stage.formula_time
    assert "attention.key.weight" in stage.gathered

    assert held_weights(stage.plan) <= held_weights(stage.formula)
    assert stage.plan.figures is not None
    assert stage.formula.figures is not None
    assert stage.plan.figures.memory <= stage.formula.figures.memory


def test_without_sequence_parallelism_the_program_finds_it() -> None:
    model, cluster = Transformer.load("gpt3-175b"), Cluster.load("h100")
    stage = planned(Layers(model, Strategy(batch=1, tp=8, sequence_parallel=False), cluster))
    assert stage.moved["x"] == ("S(1)", "B")
    assert stage.time < 0.99 * stage.formula_time


def test_a_layer_goes_on_as_it_came() -> None:
    graph = captured(Transformer.load("mixtral-8x7b"), 1, 512)
    outputs = {output.name: output.value for output in graph.outputs}
    inputs = {source.name: source.value for source in graph.inputs}
    assert set(outputs) == {name for name in inputs if name not in {"cosines", "sines"}}
    assert all(value.shape == inputs[name].shape for name, value in outputs.items())
    assert {node.phase for node in graph.nodes} == {Phase.FORWARD, Phase.BACKWARD}
    stage = planned(layers_of("mixtral-8x7b", tp=2))
    for plan in (stage.plan, stage.formula):
        ends = dict(zip((output.name for output in plan.graph.outputs), plan.ends, strict=True))
        assert all(ends[name] == plan.layouts[name].placements for name in ends)


def test_nothing_is_planned_for_one_rank_and_kinds_only_once() -> None:
    stages = Stages()
    assert stages.of(layers_of("gpt3-175b")) is None
    assert stages.saved(layers_of("gpt3-175b")) == (0.0, 0.0)
    first = stages.of(layers_of("gpt3-175b", tp=2, pp=8))
    assert stages.of(layers_of("gpt3-175b", tp=2, pp=4)) is first


def test_fused_kernels_keep_values_out_of_memory() -> None:
    layers = layers_of("llama3-8b", tp=1)
    graph = captured(layers.model, 1, layers.model.seq)
    costs = StageCosts.of(graph, Mesh.of(tp=2), layers.cluster, layers.kernels, (0.0, 0.0))
    names = {(node.name, at) for node in graph.nodes for at in range(len(node.inputs) + len(node.outputs))}
    assert costs.kept < names
    squared = next(node for node in graph.nodes if node.op == "aten.mul.Tensor")
    assert (squared.name, 0) not in costs.kept  # the layer's input is read once ...
    assert (squared.name, 1) in costs.kept
    assert (squared.name, 2) in costs.kept  # ... and its square never written


def test_the_formula_stands_where_no_plan_is_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(module._Bounded):
        def best(self) -> tuple[Plan, Options]:
            if self.memory is not None:
                raise Unsolved("no time")
            return super().best()

    monkeypatch.setattr(module, "_Bounded", Slow)
    layers = layers_of("llama3-8b", tp=4)
    stage = solve(layers, captured(layers.model, 1, layers.model.seq))
    assert stage.time == stage.formula_time
    assert stage.plan.figures is not None
    assert 0.0 < stage.plan.figures.gap < 0.1
    assert stage.plan.figures.bound < stage.plan.figures.time


def test_a_plan_that_is_cut_short_is_not_worse_than_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of("gpt3-175b", tp=2)
    graph = captured(layers.model, 1, layers.model.seq)

    class Worse(module._Bounded):
        def best(self) -> tuple[Plan, Options]:
            found, options = super().best()
            assert found.figures is not None
            return replace(found, figures=replace(found.figures, compute=1.0)), options

    monkeypatch.setattr(module, "_Bounded", Worse)
    stage = solve(layers, graph)
    assert stage.plan.layouts == stage.formula.layouts
    assert stage.time == stage.formula_time
    assert stage.plan.figures is not None
    assert stage.plan.figures.time < 0.1


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", "--config", "gpt3-175b", "--devices", "64", "--top", "2")
    assert console.run(ringhold, arguments) == 0
    out, _ = capsys.readouterr()
    assert "inside a stage, by integer program" in out
    assert "the best" in out
    assert console.run(ringhold, (*arguments, "--json")) == 0
    report = json.loads(capsys.readouterr()[0])
    assert len(report["plans"]) == 2
    for plan in report["plans"]:
        assert plan["tp"] == 1 or plan["stage"]["ranks"] == plan["tp"]
        assert plan["time"] <= plan["time_as_formulas_divide_stages"]
