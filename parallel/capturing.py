"""Capture: a user's training step becomes one flat graph of aten operations.

`capture(loss_fn, model, optimizer, example)` runs forward, loss and backward once on fake tensors, which have shapes
but no memory, so a model of 70 billion parameters (built under `torch.device("meta")`) costs nothing. The optimizer's
update is written behind it (`parallel.update`). The planner, the executor and the signatures' tests take the result.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from collectives.errors import CaptureError, RingholdError, UsageError
from parallel import update
from parallel.decompositions import TABLE
from parallel.graph import Graph, Role
from parallel.lowering import Captured, Source, lower
from parallel.modules import Watch

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Step:
    """A captured training step.

    Args:
        graph: forward, backward and update.
        batch: how the tensors of a batch are put together; `inputs` takes batches of this form.

    """

    graph: Graph
    batch: pytree.TreeSpec

    def inputs(self, model: nn.Module, optimizer: Optimizer, batch: Any) -> dict[str, Tensor]:
        """Everything that the graph needs, by the user's names, as it is now: parameters, buffers, state, rates, batch.

        Tensors of the model and the optimizer are not copied. State that the optimizer does not have yet is zero.

        Raises:
            UsageError: the batch has another form than the example had, or a tensor another shape.

        """
        leaves, spec = pytree.tree_flatten(batch)
        if spec != self.batch:
            raise UsageError(f"the step was captured with a batch of the form {self.batch}, not {spec}")
        owned = dict(model.named_parameters())
        found: dict[str, Tensor] = {**owned, **dict(model.named_buffers())}
        found.update(zip(_batch_names(batch), leaves, strict=True))
        for number, group in enumerate(optimizer.param_groups):
            found[f"lr.{number}"] = torch.as_tensor(group["lr"], dtype=torch.float64)
        result = {}
        for source in self.graph.inputs:
            if source.role == Role.STATE:
                found[source.name] = _state(source.name, source.parameter, owned, optimizer)
            if source.role == Role.CONSTANT:
                continue
            tensor = found.get(source.name)
            if tensor is None or tuple(tensor.shape) != source.value.shape:
                held = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise UsageError(
                    f"the step needs {source.role} {source.name} of shape {source.value.shape}, not {held}"
                )
            result[source.name] = tensor
        return result


def _state(name: str, parameter: str, owned: Mapping[str, Tensor], optimizer: Optimizer) -> Tensor:
    if not parameter:  # the number of steps taken, which torch keeps once for each parameter
        taken = max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0.0)
        return torch.tensor(taken, dtype=torch.float64)
    held = optimizer.state.get(owned[parameter], {}).get(name.rpartition(".")[2])
    return held if isinstance(held, Tensor) else torch.zeros_like(owned[parameter])


def capture(loss_fn: LossFunction, model: nn.Module, optimizer: Optimizer, example: Any) -> Step:
    """Capture `loss_fn(model, batch)`, its backward and the optimizer's update as one graph.

    Nothing is allocated or changed: the model's tensors may be on the meta device, and the optimizer keeps its state.

    Args:
        loss_fn: returns the loss, a scalar.
        model: in training mode or not, as the step shall run.
        optimizer: SGD, Adam or AdamW of `torch.optim` over the model's parameters.
        example: a batch; of its tensors only shapes and dtypes count. Any nesting of lists, tuples and dicts.

    Raises:
        CaptureError: the code looks at values, makes shapes of them, or does what cannot be traced; the message says
            what and at which line.
        Unsupported: the optimizer or one of its options is not known.
        UsageError: the loss is no scalar, no parameter has a gradient, or an argument is something else.

    """
    _check(loss_fn, model, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = update.slots(optimizer, names)
    leaves, spec = pytree.tree_flatten(example)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # tensors that the code holds beside the model's: constants
    sources = [
        *(Source(Role.PARAMETER, name, _fake(fakes, tensor)) for name, tensor in model.named_parameters()),
        *(Source(Role.BUFFER, name, _fake(fakes, tensor)) for name, tensor in model.named_buffers()),
        *(
            Source(Role.BATCH, name, _fake(fakes, tensor))
            for name, tensor in zip(_batch_names(example), leaves, strict=True)
        ),
    ]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for source in sources:
        if source.name in kept and source.name not in frozen:
            source.tensor.requires_grad_()
    captured = _trace(_Program(loss_fn, model, sources, spec), fakes)
    return Step(lower(captured, optimizer, kept), spec)


def _check(loss_fn: object, model: object, optimizer: object) -> None:
    """Raise `UsageError` if arguments are mixed up, before torch says so in its own words."""
    kinds = {"loss_fn": loss_fn, "model": model, "optimizer": optimizer}
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer) or not callable(loss_fn):
        given = ", ".join(f"{name} a {type(what).__name__}" for name, what in kinds.items())
        raise UsageError(
            f"a step is captured of a loss function of model and batch, the model (a Module), its optimizer and a "
            f"batch, in this order; here is {given}"
        )
    if isinstance(loss_fn, nn.modules.loss._Loss):
        raise UsageError(
            f"loss_fn is called with the model and a batch, which {type(loss_fn).__name__} is not made for; write a "
            f"function such as `lambda model, batch: loss(model(batch[0]), batch[1])`"
        )


def _batch_names(batch: Any) -> list[str]:
    """`batch`, `batch.0`, `batch.tokens`: by the way to each leaf. UsageError: a leaf is no tensor, or an empty one."""
    names = []
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        name = ".".join(["batch", *(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)])
        if not isinstance(leaf, Tensor):
            raise UsageError(f"{name} is a {type(leaf).__name__}; a batch consists of tensors: put others into loss_fn")
        if not leaf.numel():
            raise UsageError(
                f"{name} of shape {list(leaf.shape)} has no elements; give a batch of the size to plan for"
            )
        names.append(name)
    return names


def _fake(fakes: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype on the CPU, without memory."""
    with fakes:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


class _Bound(nn.Module):
    """Forward, loss and gradients as one module around the model, so that `functional_call` can lend it other tensors.

    They stay lent in the backward pass, in which checkpointed layers run forward once more.
    """

    def __init__(self, loss_fn: LossFunction, model: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.loss_fn, self.model, self.watch = loss_fn, model, watch

    def forward(self, batch: Any, moved: list[Tensor]) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
        with self.watch.forward(self.model):
            loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise UsageError(
                f"loss_fn must return a scalar that depends on the optimizer's parameters, not {_described(loss)}"
            )
        with self.watch.backward(loss):
            gradients: list[Tensor | None] = list(torch.autograd.grad(loss, moved, allow_unused=True))
        if any(parameter.grad is not None for parameter in moved):
            raise UsageError(
                "loss_fn calls backward by itself, so that gradients are added up beside the step; return the sum of "
                "the losses instead"
            )
        return loss, gradients, dict(self.model.named_buffers())


def _described(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    if loss.dim():
        return f"shape {tuple(loss.shape)}"
    return "a scalar that no gradient flows through (detached, of no_grad, or backward was called on it)"


@dataclass(frozen=True)
class _Program:
    """Forward and backward as a function of the sources' tensors."""

    loss_fn: LossFunction
    model: nn.Module
    sources: list[Source]
    spec: pytree.TreeSpec

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        return [source.name for source in self.sources if source.role == Role.BUFFER]

    def run(self, watch: Watch, tensors: list[Tensor]) -> list[Tensor | None]:
        """Loss, a gradient (or None) for each tensor that requires one, the buffers as they are then."""
        lent = {
            f"model.{source.name}": tensor
            for source, tensor in zip(self.sources, tensors, strict=True)
            if source.role != Role.BATCH
        }
        batch = pytree.tree_unflatten(tensors[len(lent) :], self.spec)
        moved = [tensor for tensor in tensors if tensor.requires_grad]
        bound = _Bound(self.loss_fn, self.model, watch)
        loss, gradients, held = functional_call(bound, lent, (batch, moved))
        return [loss, *gradients, *(held.get(name, lent[f"model.{name}"]) for name in self.buffers)]


def _trace(program: _Program, fakes: FakeTensorMode) -> Captured:
    """Trace on fake tensors; once more, in torch's functional mode, if the model's code writes into tensors.

    That mode turns writing into making, and takes twice the time.
    """
    tensors = [source.tensor for source in program.sources]
    watch = Watch()

    def plain(*tensors: Tensor) -> Any:
        return program.run(watch, list(tensors))

    def functional(*tensors: Tensor) -> Any:
        with FunctionalTensorMode():
            results = program.run(watch, [_wrapped(tensor) for tensor in tensors])
            return [None if tensor is None else from_fun(tensor) for tensor in results]

    with fakes, _explained():
        traced = make_fx(plain, decomposition_table=TABLE, tracing_mode="real")(*tensors)
        writing = [node for node in traced.graph.nodes if _writes(node)]
        for node in writing:
            _refuse_if_lost(node)
        if writing:
            watch = Watch()
            traced = make_fx(functional, decomposition_table=TABLE, tracing_mode="real")(*tensors)
    return Captured(program.sources, traced, watch, program.buffers)


def _refuse_if_lost(node: fx.Node) -> None:
    """Refuse to write into a tensor that the model holds beside its parameters and buffers: it would stay as it is."""
    into = node.args[0]
    while isinstance(into, fx.Node) and isinstance(into.target, OpOverload) and into.target.is_view:
        into = into.args[0]
    if isinstance(into, fx.Node) and into.op == "get_attr":
        shape = list(node.meta["val"].shape)
        raise CaptureError(
            f"{node.target} writes into a tensor of shape {shape} that is neither a parameter nor a buffer of the "
            f"model; make it a buffer (register_buffer), so that the step gives its new value"
        )


def _wrapped(tensor: Tensor) -> Tensor:
    """A tensor of the functional mode, with a gradient of its own."""
    wrapped: Tensor = to_fun(tensor.detach())
    return wrapped.requires_grad_(tensor.requires_grad)


def _writes(node: fx.Node) -> bool:
    """Whether a traced operation changes a tensor: by its schema, or a batch norm's running mean, which that hides."""
    if str(node.target) == "aten.native_batch_norm.default":
        return True
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what tracing raises into a `CaptureError` that says what and where."""
    try:
        yield
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise CaptureError(
            f"{_where(error)}: the step looks at the value of a tensor, so that its graph depends on data; "
            f"compute with torch.where or masks instead ({_first_line(error)})"
        ) from error
    except DynamicOutputShapeException as error:
        raise CaptureError(
            f"{_where(error)}: {error.func} gives a shape that depends on data; use shapes that are known before, "
            f"such as a mask or a fixed capacity"
        ) from error
    except FakeTensorDeviceMismatchError as error:
        raise CaptureError(
            f"{_where(error)}: a tensor that the code holds beside parameters, buffers and batch is on another device; "
            f"make it a buffer (register_buffer), or build it on the CPU ({_first_line(error)})"
        ) from error
    except RingholdError:
        raise
    except Exception as error:  # whatever the user's code raises on tensors without values
        what = f"{type(error).__name__}: {_first_line(error)}"
        raise CaptureError(f"{_where(error)}: the step cannot be traced: {what}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _where(error: BaseException) -> str:
    """File and line of the innermost code that is neither torch's nor ours."""
    ours, here = (str(Path(torch.__file__).parent), "<"), Path(__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours) and Path(frame.filename).parent != here
    ]
    if not frames:
        return "the step"
    return f"{frames[-1].filename}:{frames[-1].lineno} (in {frames[-1].name})"
