"""Optimizers as graph: the formulas of torch's SGD, Adam and AdamW, written out in aten operations.

Used by `parallel.capture`. Tracing torch's own optimizers would record their mutations and bake the learning rate in;
here it is an input, so that one captured step serves a schedule. The results are those of `torch.optim` to rounding:
sums, quotients and roots are taken in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from collectives.errors import Unsupported
from parallel.graph import Argument, Input, Node, Output, Phase, Role, Value, flatten

_HANDLED: dict[type[Optimizer], set[str]] = {
    SGD: {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"},
    Adam: {"lr", "betas", "eps", "weight_decay", "maximize", "amsgrad", "decoupled_weight_decay"},
    AdamW: {"lr", "betas", "eps", "weight_decay", "maximize", "amsgrad", "decoupled_weight_decay"},
}
_HARMLESS = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
"""Options that choose an implementation, not a result."""


@dataclass(frozen=True, slots=True)
class Slots:
    """What an optimizer remembers of a parameter, and the hyperparameters of the parameter's group."""

    group: int
    options: Mapping[str, Any]
    states: tuple[str, ...]


def slots(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Slots]:
    """For each parameter by name (`names` is by `id` of the tensor): its group and the states that it needs.

    Raises:
        Unsupported: the optimizer is another one, or an option is used that is not here.

    """
    if type(optimizer) not in _HANDLED:
        known = ", ".join(kind.__name__ for kind in _HANDLED)
        raise Unsupported(f"optimizer {type(optimizer).__name__} cannot be captured; use one of {known} of torch.optim")
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise Unsupported(
                    f"parameter group {number} of the optimizer has a tensor of shape {tuple(parameter.shape)} that "
                    f"is no parameter of the model; give the optimizer the model's own parameters"
                )
            _check(optimizer, number, group)
            found[names[id(parameter)]] = Slots(number, group, _states(optimizer, group))
    return found


def _check(optimizer: Optimizer, number: int, group: Mapping[str, Any]) -> None:
    where = f"{type(optimizer).__name__}, parameter group {number}"
    strange = {name for name in group if name not in _HANDLED[type(optimizer)] | _HARMLESS}
    if used := sorted(name for name in strange if group[name]):
        raise Unsupported(f"{where}: option {used[0]}={group[used[0]]!r} cannot be captured; leave it out")
    if group.get("dampening"):
        raise Unsupported(f"{where}: dampening makes the first step differ from all others; use dampening=0")


def _states(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if group["momentum"] else ()
    return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))


class Writer:
    """Collects the nodes of the update, its inputs and its outputs."""

    def __init__(self) -> None:
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.outputs: list[Output] = []
        self.module = ""
        """The module that the nodes to come belong to."""

    def source(self, role: Role, name: str, shape: tuple[int, ...], dtype: torch.dtype, parameter: str = "") -> Value:
        """Add an input."""
        value = Value(f"{role}_{name}".replace(".", "_"), shape, dtype)
        self.inputs.append(Input(value, role, name, parameter))
        return value

    def result(self, role: Role, name: str, value: Value) -> None:
        """Add an output."""
        self.outputs.append(Output(value, role, name))

    def op(self, name: str, *args: Argument, **kwargs: Argument) -> Value:
        """Add a node whose output is like its first tensor."""
        like = next(flatten(args))
        title = f"update_{len(self.nodes)}_{name.partition('.')[0]}"
        value = Value(title, like.shape, like.dtype)
        node = Node(title, f"aten.{name}", args, tuple(kwargs.items()), (value,), (), Phase.UPDATE, self.module)
        self.nodes.append(node)
        return value


def write(
    optimizer: Optimizer, kept: Mapping[str, Slots], parameters: Mapping[str, Value], gradients: Mapping[str, Value]
) -> Writer:
    """Write the update of every parameter that has a gradient; all by name."""
    writer = Writer()
    moved = [name for name in kept if name in gradients]
    groups = {kept[name].group: kept[name].options for name in moved}
    rates = {number: writer.source(Role.RATE, f"lr.{number}", (), torch.float64) for number in sorted(groups)}
    rule: _Rule = (_Sgd if isinstance(optimizer, SGD) else _Adam)(writer, groups, rates)
    for name in moved:
        writer.module = name.rpartition(".")[0]
        parameter, gradient = parameters[name], gradients[name]
        if groups[kept[name].group]["maximize"]:
            gradient = writer.op("neg.default", gradient)
        states = {
            state: writer.source(Role.STATE, f"{name}.{state}", parameter.shape, parameter.dtype, name)
            for state in kept[name].states
        }
        fresh, remembered = rule.update(kept[name].group, parameter, gradient, states)
        writer.result(Role.PARAMETER, name, fresh)
        for state, value in remembered.items():
            writer.result(Role.STATE, f"{name}.{state}", value)
    return writer


class _Rule(Protocol):
    """Writes the update of one parameter: returns its new value and its new states."""

    def update(
        self, group: int, parameter: Value, gradient: Value, states: Mapping[str, Value]
    ) -> tuple[Value, dict[str, Value]]: ...


class _Sgd:
    """SGD with momentum (Sutskever et al., 2013), in torch's form."""

    def __init__(self, writer: Writer, groups: Mapping[int, Mapping[str, Any]], rates: Mapping[int, Value]) -> None:
        self.op, self.groups, self.rates = writer.op, groups, rates

    def update(
        self, group: int, parameter: Value, gradient: Value, states: Mapping[str, Value]
    ) -> tuple[Value, dict[str, Value]]:
        op, options = self.op, self.groups[group]
        remembered = {}
        if options["weight_decay"]:
            gradient = op("add.Tensor", gradient, parameter, alpha=options["weight_decay"])
        if options["momentum"]:
            buffer = op("add.Tensor", op("mul.Scalar", states["momentum_buffer"], options["momentum"]), gradient)
            remembered["momentum_buffer"] = buffer
            gradient = op("add.Tensor", gradient, buffer, alpha=options["momentum"]) if options["nesterov"] else buffer
        return op("sub.Tensor", parameter, op("mul.Tensor", gradient, self.rates[group])), remembered


class _Adam:
    """Adam (Kingma & Ba, 2015) and AdamW (Loshchilov & Hutter, 2019), in torch's form.

    Bias corrections and step sizes are one chain of scalars for each parameter group, in fp64 as torch takes them.
    """

    def __init__(self, writer: Writer, groups: Mapping[int, Mapping[str, Any]], rates: Mapping[int, Value]) -> None:
        self.op, self.groups, self.rates = writer.op, groups, rates
        taken = writer.op("add.Scalar", writer.source(Role.STATE, "step", (), torch.float64), 1)
        writer.result(Role.STATE, "step", taken)
        self.scalars = {number: self._scalars(options, rates[number], taken) for number, options in groups.items()}

    def _scalars(self, options: Mapping[str, Any], rate: Value, taken: Value) -> tuple[Value, Value, Value | None]:
        """Step size, root of the second moment's correction, and the factor of decoupled weight decay."""
        op = self.op
        first, second = (op("rsub.Scalar", op("pow.Scalar", beta, taken), 1) for beta in options["betas"])
        shrink = None
        if options["decoupled_weight_decay"] and options["weight_decay"]:
            shrink = op("rsub.Scalar", op("mul.Scalar", rate, options["weight_decay"]), 1)
        return op("div.Tensor", rate, first), op("sqrt.default", second), shrink

    def update(
        self, group: int, parameter: Value, gradient: Value, states: Mapping[str, Value]
    ) -> tuple[Value, dict[str, Value]]:
        op, options = self.op, self.groups[group]
        step_size, root, shrink = self.scalars[group]
        beta1, beta2 = options["betas"]
        if shrink is not None:
            parameter = op("mul.Tensor", parameter, shrink)
        elif options["weight_decay"]:
            gradient = op("add.Tensor", gradient, parameter, alpha=options["weight_decay"])
        mean = op("lerp.Scalar", states["exp_avg"], gradient, 1 - beta1)
        faded = op("mul.Scalar", states["exp_avg_sq"], beta2)
        square = op("addcmul.default", faded, gradient, gradient, value=1 - beta2)
        remembered = {"exp_avg": mean, "exp_avg_sq": square}
        if options["amsgrad"]:
            square = op("maximum.default", states["max_exp_avg_sq"], square)
            remembered["max_exp_avg_sq"] = square
        scale = op("add.Scalar", op("div.Tensor", op("sqrt.default", square), root), options["eps"])
        move = op("div.Tensor", op("mul.Tensor", mean, step_size), scale)
        return op("sub.Tensor", parameter, move), remembered
