"""Clipping of gradients by their global norm, written into a captured step. Called by `launch.planned`.

The formula is that of `torch.nn.utils.clip_grad_norm_`: all gradients are multiplied by `most / (norm + 1e-6)` where
that is less than 1. On shards, the sum of squares is partial and the norm costs a few bytes.
"""

from dataclasses import replace

from parallel.graph import Argument, Graph, Node, Phase, Role, Value

_EPSILON = 1e-6


def clipped(graph: Graph, most: float) -> Graph:
    """The step with its gradients clipped to a global norm of `most` before the update.

    The outputs with role `GRADIENT` remain what the backward pass gives.
    """
    gradients = list(dict.fromkeys(out.value for out in graph.outputs if out.role == Role.GRADIENT))
    write = _Writer()
    total: Value | None = None
    for gradient in gradients:
        square = write("mul.Tensor", gradient.shape, gradient, gradient)
        dims = tuple(range(len(gradient.shape)))
        one = write("sum.dim_IntList", (), square, dims) if dims else square
        total = one if total is None else write("add.Tensor", (), total, one)
    if total is None:
        return graph
    norm = write("add.Scalar", (), write("sqrt.default", (), total), _EPSILON)
    factor = write("clamp.default", (), write("mul.Scalar", (), write("reciprocal.default", (), norm), most), None, 1.0)
    scaled = {gradient: write("mul.Tensor", gradient.shape, gradient, factor) for gradient in gradients}
    before = [node for node in graph.nodes if node.phase != Phase.UPDATE]
    after = [_with(node, scaled) for node in graph.nodes if node.phase == Phase.UPDATE]
    return replace(graph, nodes=(*before, *write.nodes, *after))


class _Writer:
    """Adds nodes of the update phase."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def __call__(self, op: str, shape: tuple[int, ...], first: Value, *rest: Argument) -> Value:
        name = f"clip_{len(self.nodes)}_{op.partition('.')[0]}"
        value = Value(name, shape, first.dtype)
        self.nodes.append(Node(name, f"aten.{op}", (first, *rest), (), (value,), (), Phase.UPDATE))
        return value


def _with(node: Node, others: dict[Value, Value]) -> Node:
    """The node with other values for some of its arguments."""

    def put(argument: Argument) -> Argument:
        if isinstance(argument, Value):
            return others.get(argument, argument)
        return tuple(map(put, argument)) if isinstance(argument, tuple) else argument

    return replace(node, args=tuple(map(put, node.args)), kwargs=tuple((name, put(arg)) for name, arg in node.kwargs))
