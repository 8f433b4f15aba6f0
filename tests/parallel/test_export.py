"""Plans in the words of DTensor, Megatron and checkpoints; and what these cannot say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint import load, save
from collectives.communicator import Communicator
from collectives.errors import CorruptFile, Unsupported, UsageError
from parallel import planner
from parallel.export import describe, device_mesh, dtensor_placements, load_layouts, megatron_flags, save_layouts
from parallel.graph import Role
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Split
from parallel.models.examples import example
from parallel.plans import Plan
from parallel.signatures import signatures
from tests.harness.residents import Residents
from tests.parallel import execute_programs, export_programs
from tests.parallel.random_plans import gpt, sharding

B, S0, S1 = Broadcast(), Split(0), Split(1)


def follow(start: dict[Role, Placement]) -> Plan:
    """The plan on two ranks in which inputs of a role are placed so and every node does what its inputs suggest."""
    graph, mesh, made, nodes, starts = gpt(torch.float64)[0].graph, Mesh.of(x=2), dict[str, Placement](), [], []
    for source in graph.inputs:
        wanted = start.get(source.role, B)
        fits = isinstance(wanted, Split) and len(source.value.shape) > wanted.dim
        made[source.value.name] = wanted if fits else B
        starts.append((made[source.value.name],))
    for node in graph.nodes:
        given = tuple(made[value.name] for value in node.inputs)
        chosen = max(signatures(node, 2), key=lambda s: sum(a == b for a, b in zip(s.inputs, given, strict=True)))
        nodes.append(sharding([chosen]))
        made.update(zip((value.name for value in node.outputs), chosen.outputs, strict=True))
    ends = tuple((made[out.value.name],) if out.role == Role.GRADIENT else (B,) for out in graph.outputs)
    return Plan(mesh, graph, tuple(starts), tuple(nodes), ends)


@pytest.mark.timeout(240)
def test_torch_cuts_as_the_layout_does(tmp_path: Path) -> None:
    with Residents(4, transport="sockets") as group:
        group.start(export_programs.distribute, store=str(tmp_path / "store"))
        for found in group.collect(timeout=180.0):  # each imports torch's DTensor
            assert found == [True] * len(export_programs.CASES)


def test_what_torch_cuts_otherwise_is_refused() -> None:
    mesh = Mesh.of(x=4)
    assert dtensor_placements(Layout(mesh, (S0,)), (8, 6))
    assert str(dtensor_placements(Layout(mesh, (Partial("prod"),)), (8,))[0]) == "P(product)"
    with pytest.raises(Unsupported, match=r"rank 1 holds \[2\].*would give it \[3\]|rank 2 holds \[2\].*pad the dim"):
        dtensor_placements(Layout(mesh, (S0,)), (10,))
    with pytest.raises(Unsupported, match="no placement for parts of a flattened tensor"):
        dtensor_placements(Layout(mesh, (Flat(),)), (8,))
    plan = execute_programs.drawn([2], 3)
    with pytest.raises(Unsupported, match="torch orders the ranks along an axis"):
        device_mesh(Mesh((("x", 2),), (1, 0)))
    told = describe(plan)
    assert set(told["dtensor"]) == set(plan.layouts)
    assert "megatron" in told["refused"]


def test_a_layout_file_serves_checkpoints(tmp_path: Path) -> None:
    plan = execute_programs.drawn([1], 2)
    save_layouts(plan, tmp_path / "layouts.json")
    layouts = load_layouts(tmp_path / "layouts.json")
    state = {name: tensor for name, tensor in gpt(torch.float64)[1].items() if name in layouts}
    assert layouts == {name: plan.layouts[name] for name in state}
    with Communicator.solo() as comm:
        save(tmp_path / "saved", state, layouts, comm=comm)
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        load(tmp_path / "saved", found, layouts, comm=comm)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is no JSON"),
        ("[]", "is no layout file of version 1"),
        (json.dumps({"ringhold_layouts": 2, "layouts": {}}), "is no layout file of version 1"),
        (json.dumps({"ringhold_layouts": 1, "layouts": {"a": {"mesh": 3}}}), "this one is malformed"),
    ],
)
def test_a_damaged_layout_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(CorruptFile, match=message):
        load_layouts(tmp_path / "file")
    with pytest.raises(UsageError, match="name a layout file"):
        load_layouts(tmp_path / "none")


def test_megatron_knows_data_parallelism_and_its_shardings() -> None:
    plan = follow({Role.BATCH: S0})
    assert megatron_flags(plan) == ()
    split = tuple((S0,) if source.role == Role.STATE and source.value.shape else (B,) for source in plan.graph.inputs)
    assert megatron_flags(replace(plan, starts=split)) == ("--use-distributed-optimizer",)
    split = tuple((S0,) if source.value.shape else (B,) for source in plan.graph.inputs)
    assert "--use-torch-fsdp2" in megatron_flags(replace(plan, starts=split))


@pytest.mark.parametrize(
    ("batch", "hidden", "flags"), [(128, 1024, ("--tensor-model-parallel-size", "4")), (1024, 128, ())]
)
def test_the_planner_finds_what_megatron_does(batch: int, hidden: int, flags: tuple[str, ...]) -> None:
    """Two layers: column-row where weights are larger than activations, else data parallel, however it updates."""
    found = megatron_flags(planner.plan(example("mlp", batch=batch, hidden=hidden).capture(), Mesh.of(x=4)))
    assert found == flags or (not flags and found[0] in {"--use-distributed-optimizer", "--use-torch-fsdp2"})


def test_what_megatron_does_not_know_is_refused() -> None:
    with pytest.raises(Unsupported, match="axis x is neither data parallel nor tensor parallel throughout"):
        megatron_flags(follow({}))
    with pytest.raises(Unsupported, match=r"axis axis0 (is neither|splits)"):
        megatron_flags(execute_programs.drawn([2], 3))
    uneven = planner.plan(example("mlp", batch=128, hidden=1022).capture(), Mesh.of(x=4))
    with pytest.raises(Unsupported, match=r"axis x of 4 splits dimension 0 of up\.weight, .* into uneven parts"):
        megatron_flags(uneven)
