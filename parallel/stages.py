"""The integer program inside a stage: where one layer's tensors live on the tensor-parallel ranks of a pipeline stage.

A layer of the model is captured, forward and backward, for one microbatch, and closed to a ring: what leaves it must be
placed as what enters it, gradients likewise, for the next layer is its equal. The planner solves that on the mesh of
the stage's ranks, once freely and once with the division of the closed formulas (Megatron's columns and rows) pinned,
in the same costs. `ringhold plan --config` calls it for the divisions in front.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from collectives.errors import RingholdError
from parallel.capturing import capture
from parallel.explain import optimality, written
from parallel.graph import Graph, Input, Node, Output, Phase, Role
from parallel.layout import Broadcast, Mesh, Placement, Split
from parallel.models.transformer import Attention, Perceptron, RMSNorm, SwiGLU, rotary_angles
from parallel.options import Options
from parallel.planner import Search
from parallel.plans import Placements, Plan
from parallel.program import Program, cheapest
from parallel.scale.layer import Layers
from parallel.scale.transformer import Transformer
from parallel.stage_costs import StageCosts

_BATCH = "batch"
_COLUMNS = ("query", "key", "value", "gate", "up")
_ROWS = ("out.weight", "down.weight")
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Stage:
    """One layer on a stage's ranks.

    Attributes:
        plan: the program's, with its optimality gap.
        formula: the best with Megatron's division of the weights, in the same costs.
        forward, backward: seconds of the program's plan.
        formula_forward, formula_backward: of the other.

    """

    plan: Plan
    formula: Plan
    forward: float
    backward: float
    formula_forward: float
    formula_backward: float

    @property
    def time(self) -> float:
        """Seconds of the program's plan, forward and backward."""
        return self.forward + self.backward

    @property
    def formula_time(self) -> float:
        """Seconds of the formula's division."""
        return self.formula_forward + self.formula_backward

    @property
    def gathered(self) -> list[str]:
        """The weights that the program's plan gathers, instead of using them where they live."""
        names = {source.value.name: source.name for source in self.plan.graph.inputs if _weight(source)}
        sent = (reshard.value.name for reshard in self.plan.collectives)
        return list(dict.fromkeys(names[name] for name in sent if name in names))

    @property
    def moved(self) -> dict[str, tuple[str, str]]:
        """Inputs that live elsewhere than the formula has them: placements of the program's plan, and of the other."""
        pairs = ((name, layout, self.formula.layouts[name]) for name, layout in self.plan.layouts.items())
        return {name: (written(a.placements), written(b.placements)) for name, a, b in pairs if a != b}

    def to_json(self) -> dict[str, Any]:
        """As JSON values: seconds, placements by name, what is proven."""
        figures = self.plan.figures
        assert figures is not None
        return {
            "ranks": self.plan.mesh.size,
            "microbatch": list(self.plan.graph.named["x"].value.shape),
            "forward_time": self.forward,
            "backward_time": self.backward,
            "formula_forward_time": self.formula_forward,
            "formula_backward_time": self.formula_backward,
            "optimality_gap": figures.gap,
            "lower_bound": figures.bound,
            "optimality": optimality(self.plan),
            "placements": {name: written(layout.placements) for name, layout in self.plan.layouts.items()},
            "gathers": self.gathered,
        }


class Stages:
    """Plans stages, each kind once: what a program depends on is the width of the stage and its microbatch."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Stage] = {}
        self._graphs: dict[tuple[int, int], Graph] = {}

    def of(self, layers: Layers) -> Stage | None:
        """The stage of a division; None where there is nothing to divide (tp 1)."""
        strategy = layers.strategy
        if strategy.tp == 1:
            return None
        key = (strategy.tp, strategy.microbatch, strategy.cp, strategy.sequence_parallel, strategy.precision)
        if key not in self._known:
            shape = strategy.microbatch, layers.model.seq // strategy.cp
            if shape not in self._graphs:
                self._graphs[shape] = captured(layers.model, *shape)
            self._known[key] = solve(layers, self._graphs[shape])
        return self._known[key]

    def saved(self, layers: Layers) -> tuple[float, float]:
        """Seconds of a layer's forward and backward pass that the program saves over the formula's division."""
        stage = self.of(layers)
        if stage is None:
            return 0.0, 0.0
        return stage.formula_forward - stage.forward, stage.formula_backward - stage.backward


def solve(layers: Layers, graph: Graph, seconds: float = 10.0) -> Stage:
    """Plan a captured layer on the tensor-parallel ranks of a stage, in no more memory than the formula's division.

    Neither all that it holds at its peak nor its weights by themselves, whose gradients and optimizer state stand
    behind them for the whole step, may be more.

    Args:
        layers: the model, its division and the cluster.
        graph: of `captured`, for the division's microbatch.
        seconds: that branch and bound may take.

    Where no better plan than the formula's is found in that time, it is the plan, with what is proven of it.

    """
    forward, backward = (part.attention for part in layers.attention())
    mesh = Mesh.of(tp=layers.strategy.tp)
    costs = StageCosts.of(graph, mesh, layers.cluster, layers.kernels, (forward, backward))
    pins = formula_pins(graph, layers.strategy.sequence_parallel)
    formula, _ = _Formula(graph, costs, pins, None, False, seconds).best()
    assert formula.figures is not None
    weights = _weights(formula, costs)
    try:
        found, _ = _Bounded(graph, costs, {}, formula.figures.memory, False, seconds, weights).best()
    except RingholdError:  # none was found in that time
        found = _proven(formula, _Bounded(graph, costs, {}, None, False, seconds, weights))
    assert found.figures is not None
    if found.figures.time > formula.figures.time:  # branch and bound was stopped before it came to what is known
        found = _bounded(formula, found.figures.bound)
    return Stage(found, formula, *_passes(found, costs), *_passes(formula, costs))


def _proven(formula: Plan, search: Search) -> Plan:
    """The formula's plan with a bound from a program that is quicker to solve: without the limit on its peak."""
    assert formula.figures is not None
    try:
        free = search.best()[0].figures
        bound = free.bound if free else 0.0
    except RingholdError:
        bound = cheapest(search.all, search.classes, search.costs)
    return _bounded(formula, bound)


def _bounded(formula: Plan, bound: float) -> Plan:
    """The formula's plan, with what is proven of all plans."""
    assert formula.figures is not None
    bound = min(bound, formula.figures.time)
    figures = replace(formula.figures, bound=bound, gap=1.0 - bound / formula.figures.time, relaxed=False)
    return replace(formula, figures=figures)


class _Formula(Search):
    """A search among plans in which weights are used where they live, never gathered."""

    def _program(self, options: Options) -> Program:
        program = super()._program(options)
        for edge in self.flows.example:
            if _weight(self.classes.first[edge.maker]):
                moved = [number for (before, after), number in program.pairs(edge).items() if before != after]
                program.row(dict.fromkeys(moved, 1.0), 0.0, 0.0)
        return program


@dataclass
class _Bounded(Search):
    """A search among plans whose weights take no more than so many bytes of a rank."""

    weights: int

    def _program(self, options: Options) -> Program:
        program = super()._program(options)
        terms: dict[int, float] = {}
        for kind, member in enumerate(self.classes.first):
            if _weight(member):
                assert isinstance(member, Input)
                for placed, numbers in program.made(kind, 0).items():
                    share = self.costs.local_bytes(member.value, placed) / self.weights
                    terms.update(dict.fromkeys(numbers, share))
        program.row(terms, -inf, 1.0 + _ROUNDING)
        return program


def _weight(member: Input | Node) -> bool:
    """Whether something is a parameter of the layer, as the activation `x` is not."""
    return isinstance(member, Input) and member.role == Role.PARAMETER and "." in member.name


def _weights(found: Plan, costs: StageCosts) -> int:
    pairs = zip(found.graph.inputs, found.starts, strict=True)
    return sum(costs.local_bytes(source.value, placed) for source, placed in pairs if _weight(source))


def formula_pins(graph: Graph, sequence_parallel: bool) -> dict[str, Placements]:
    """Where Megatron has the inputs of a layer: columns, then rows; activations along the sequence, or whole."""

    def placement(name: str) -> Placement:
        if name.endswith(_ROWS):
            return Split(1)
        return Split(0) if name.split(".")[-2] in _COLUMNS else Broadcast()

    stream: Placement = Split(1) if sequence_parallel else Broadcast()
    pins: dict[str, Placements] = {source.name: (placement(source.name),) for source in graph.inputs if _weight(source)}
    return pins | {"x": (stream,), _BATCH: (stream,)}


def captured(model: Transformer, microbatch: int, length: int) -> Graph:
    """A layer's forward and backward pass for a microbatch of so many sequences of so many tokens, in bfloat16.

    Of a mixture of experts the half with attention. The input `x` and the output's gradient `batch` are given; outputs
    are, by the names of what they must be placed like: `x` the layer's output, `batch` the input's gradient, and each
    parameter its gradient, which is added to that of the microbatches before.
    """
    with torch.device("meta"):
        layer = _Layer(model, microbatch, length).to(torch.bfloat16)
        incoming = torch.empty(microbatch, length, model.hidden, dtype=torch.bfloat16)
    step = capture(_weighted, layer, torch.optim.SGD(layer.parameters()), incoming)
    return _closed(step.graph)


class _Layer(nn.Module):
    """A layer of a GPT or a Llama whose input is a parameter, so that it has a gradient."""

    def __init__(self, model: Transformer, microbatch: int, length: int) -> None:
        super().__init__()
        norm = RMSNorm if model.gated else nn.LayerNorm
        self.x = nn.Parameter(torch.empty(microbatch, length, model.hidden))
        self.attention_norm = norm(model.hidden)
        self.attention = Attention(
            model.hidden, model.heads, model.groups, bias=not model.gated, features=model.head_dim
        )
        self.mlp: nn.Module | None = None
        if model.experts == 1:
            self.norm = norm(model.hidden)
            self.mlp = (SwiGLU if model.gated else Perceptron)(model.hidden, model.ffn)
        if model.gated:
            for name, table in zip(("cosines", "sines"), rotary_angles(length, model.width), strict=True):
                self.register_buffer(name, table, persistent=False)

    def forward(self) -> Tensor:
        """Apply it to `x`."""
        angles = (self.get_buffer("cosines"), self.get_buffer("sines")) if hasattr(self, "cosines") else None
        x: Tensor = self.x + self.attention(self.attention_norm(self.x), angles)
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x


def _weighted(layer: nn.Module, incoming: Tensor) -> Tensor:
    """A loss whose gradient by the layer's output is `incoming`."""
    out: Tensor = layer() * incoming
    return out.sum()


def _closed(graph: Graph) -> Graph:
    """The ring: without the loss and the update, outputs placed like the inputs that they go on as."""
    weighted = graph.makers[graph.output(Role.LOSS).value.name].inputs[0]
    made = next(value for value in graph.makers[weighted.name].inputs if value.name in graph.makers)
    outputs = [Output(made, Role.PARAMETER, "x")]
    for output in graph.outputs:
        if output.role == Role.GRADIENT:
            own = output.name != "x"
            outputs.append(Output(output.value, Role.PARAMETER if own else Role.BATCH, output.name if own else _BATCH))
    wanted = {output.value.name for output in outputs}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if any(value.name in wanted for value in node.outputs):
            nodes.append(node)
            wanted.update(value.name for value in node.inputs)
    inputs = tuple(source for source in graph.inputs if source.value.name in wanted)
    return Graph(inputs, tuple(reversed(nodes)), tuple(outputs), graph.constants)


def _passes(found: Plan, costs: StageCosts) -> tuple[float, float]:
    """Seconds of a plan's forward and backward pass; a change of placement belongs to where the value is made."""
    spent = dict.fromkeys((Phase.FORWARD, Phase.BACKWARD), 0.0)
    for node, sharding in zip(found.graph.nodes, found.nodes, strict=True):
        spent[node.phase] += costs.operation(node, sharding)
    for reshard in found.reshards:
        maker = found.graph.makers.get(reshard.value.name)
        phase = reshard.phase if reshard.phase in spent else maker.phase if maker else Phase.BACKWARD
        spent[phase] += costs.reshard(reshard.value, reshard.boxing)
    return spent[Phase.FORWARD], spent[Phase.BACKWARD]
