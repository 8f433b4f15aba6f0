"""Plans drawn at random: any signature of any node, so that every kind of reshard occurs; and steps to plan."""

import random
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.model import PRESETS, build
from parallel.capturing import Step, capture
from parallel.graph import Graph, Role, Value
from parallel.layout import Broadcast, Mesh, Split
from parallel.plans import Placements, Plan, Sharding
from parallel.signatures import Signature, signatures, together


def draw_plan(graph: Graph, mesh: Mesh, chance: random.Random) -> Plan:
    starts = tuple(_start(source.value, mesh, chance) for source in graph.inputs)
    nodes = []
    for node in graph.nodes:
        signed = [signatures(node, size) for size in mesh.shape]
        chosen = [options[0] for options in signed]
        for _ in range(20):
            drawn = [chance.choice(options) for options in signed]
            if together(node, drawn, mesh.shape):
                chosen = drawn
                break
        nodes.append(sharding(chosen))
    made = dict[str, Placements]()
    for node, how in zip(graph.nodes, nodes, strict=True):
        made.update(zip((value.name for value in node.outputs), how.outputs, strict=True))
    given = {source.name: start for source, start in zip(graph.inputs, starts, strict=True)}
    everywhere = (Broadcast(),) * len(mesh.axes)
    ends = []
    for out in graph.outputs:
        if out.role == Role.GRADIENT:
            ends.append(made[out.value.name])
        else:
            ends.append(everywhere if out.role == Role.LOSS else given[out.name])
    return Plan(mesh, graph, starts, tuple(nodes), tuple(ends))


def _start(value: Value, mesh: Mesh, chance: random.Random) -> Placements:
    left, placed = set(range(len(value.shape))), list[Broadcast | Split]()
    for size in mesh.shape:
        fitting = sorted(dim for dim in left if value.shape[dim] >= size)
        dim = chance.choice(fitting) if fitting and chance.random() < 0.7 else None
        left.discard(-1 if dim is None else dim)
        placed.append(Broadcast() if dim is None else Split(dim))
    return tuple(placed)


def sharding(chosen: list[Signature]) -> Sharding:
    return Sharding(
        tuple(zip(*(signature.inputs for signature in chosen), strict=True)),
        tuple(zip(*(signature.outputs for signature in chosen), strict=True)),
    )


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@cache
def gpt(dtype: torch.dtype, batch: int = 4) -> tuple[Step, dict[str, Tensor]]:
    """A step of the training job's smallest model, and its inputs."""
    numbers = torch.Generator().manual_seed(3)
    model = build(PRESETS["tiny"], 8, dtype, numbers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.randint(0, 256, (batch, 9), generator=numbers)
    example = (text[:, :-1], text[:, 1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = capture(loss_of, model, optimizer, example)
    return step, {name: tensor.detach() for name, tensor in step.inputs(model, optimizer, example).items()}
