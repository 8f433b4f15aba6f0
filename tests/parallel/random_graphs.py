"""Small graphs drawn at random: chains and joins of products, sums, views and elementwise operations, uneven sizes."""

import random
from dataclasses import dataclass, field

import torch

from parallel.graph import Argument, Graph, Input, Node, Output, Role, Value

SIZES = (2, 3, 4, 5, 6, 8, 12, 16)
KINDS = ("product", "product", "unary", "binary", "sum", "softmax", "permute", "reshape", "slice", "scale")


@dataclass
class _Drawing:
    chance: random.Random
    inputs: list[Input] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def given(self, shape: tuple[int, ...], role: Role = Role.PARAMETER) -> Value:
        name = f"input{len(self.inputs)}"
        value = Value(name, shape, torch.float32)
        self.inputs.append(Input(value, role, name))
        self.values.append(value)
        return value

    def node(self, op: str, args: tuple[Argument, ...], shape: tuple[int, ...]) -> None:
        name = f"node{len(self.nodes)}"
        value = Value(name, shape, torch.float32)
        self.nodes.append(Node(name, f"aten.{op}", args, (), (value,)))
        self.values.append(value)

    def add(self) -> None:
        """One operation of a kind that suits one of the last values."""
        kind, x = self.chance.choice(KINDS), self.chance.choice(self.values[-3:])
        rank = len(x.shape)
        if kind == "product" and rank == 2:
            w = self.given((x.shape[1], self.chance.choice(SIZES)))
            self.node("einsum.default", ("ab,bc->ac", (x, w)), (x.shape[0], w.shape[1]))
        elif kind == "binary":
            other = self.chance.choice([value for value in self.values if value.shape == x.shape])
            self.node(self.chance.choice(("add.Tensor", "mul.Tensor", "maximum.default")), (x, other), x.shape)
        elif kind == "sum" and rank:
            over = self.chance.randrange(rank)
            self.node("sum.dim_IntList", (x, (over,), False), x.shape[:over] + x.shape[over + 1 :])
        elif kind == "softmax" and rank:
            self.node("_softmax.default", (x, rank - 1, False), x.shape)
        elif kind == "permute" and rank == 2:
            self.node("permute.default", (x, (1, 0)), x.shape[::-1])
        elif kind == "reshape" and rank == 2:
            self.node("reshape.default", (x, (x.size,)), (x.size,))
        elif kind == "slice" and rank and x.shape[0] > 2:
            self.node("slice.Tensor", (x, 0, 0, x.shape[0] - 1, 1), (x.shape[0] - 1, *x.shape[1:]))
        elif kind == "scale" and rank:
            self.node("mul.Tensor", (x, self.given(x.shape[-1:])), x.shape)
        else:
            self.node(self.chance.choice(("relu.default", "exp.default", "neg.default")), (x,), x.shape)


def draw_graph(chance: random.Random, count: int) -> Graph:
    """A graph of so many operations; results that none of them takes are gradients, the last of these the loss."""
    drawing = _Drawing(chance)
    drawing.given((chance.choice(SIZES), chance.choice(SIZES)), Role.BATCH)
    for _ in range(count):
        drawing.add()
    used = {value.name for node in drawing.nodes for value in node.inputs}
    *others, last = [value for node in drawing.nodes for value in node.outputs if value.name not in used]
    outputs = (Output(last, Role.LOSS, "loss"), *(Output(value, Role.GRADIENT, value.name) for value in others))
    inputs = tuple(source for source in drawing.inputs if source.value.name in used)
    return Graph(inputs, tuple(drawing.nodes), outputs)
