"""Captured steps against torch's own, in fp64; what the graph says of itself; models that cannot be captured."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from collectives.errors import CaptureError, RingholdError, Unsupported, UsageError
from parallel.capturing import Step, capture
from parallel.graph import Graph, Phase, Role
from parallel.models.examples import MLP, Example, example, sum_of_squares
from parallel.shapes import factors
from parallel.signatures.table import TABLE

TOLERANCE = 1e-12
"""fp64, of values around 1; sums are taken in another order here and there."""
ADAM_TOLERANCE = 1e-9
"""Adam divides a gradient of rounding noise (a key's bias) by itself, and so makes much of its error."""


def compare(step: Step, case: Example, steps: int = 1, tolerance: float = TOLERANCE) -> None:
    """Run the graph and torch side by side; torch's model moves on."""
    for _ in range(steps):
        held = step.inputs(case.model, case.optimizer, case.batch)
        given = {name: tensor.detach().clone() for name, tensor in held.items()}
        before = {name: tensor.clone() for name, tensor in given.items()}
        results = {key: tensor.detach() for key, tensor in step.graph.run(given).items()}
        assert all(torch.equal(given[name], before[name]) for name in given), "inputs stay as they are"
        case.optimizer.zero_grad()
        loss = case.loss_fn(case.model, case.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        case.optimizer.step()
        expected = {(Role.LOSS, "loss"): loss.detach()}
        for name, parameter in case.model.named_parameters():
            expected[Role.PARAMETER, name] = parameter.detach()
            assert parameter.grad is not None
            expected[Role.GRADIENT, name] = parameter.grad
            for state, value in case.optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    expected[Role.STATE, f"{name}.{state}"] = value
        for key, value in expected.items():
            torch.testing.assert_close(results[key], value, rtol=tolerance, atol=tolerance, msg=str(key))
        assert {name for role, name in results if role == Role.STATE} >= {n for r, n in expected if r == Role.STATE}
        for name, buffer in case.model.named_buffers():
            if (Role.BUFFER, name) in results:
                torch.testing.assert_close(results[Role.BUFFER, name], buffer, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: SGD(p, 0.1),
        lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, maximize=True),
        lambda p: Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
        lambda p: AdamW(p, 0.01, betas=(0.8, 0.95)),
        lambda p: AdamW(p, 0.01, maximize=True, weight_decay=0.0),
    ],
)
def test_three_steps_of_each_optimizer_are_those_of_torch(optimizer: Callable[..., Optimizer]) -> None:
    torch.manual_seed(1)
    case = example("mlp", 6, hidden=5, dtype=torch.float64, device="cpu", optimizer=optimizer)
    compare(case.capture(), case, steps=3)


def test_parameter_groups_have_learning_rates_of_their_own_and_these_are_inputs() -> None:
    torch.manual_seed(1)
    model = MLP(4).double()
    groups = [{"params": [model.up.weight], "lr": 0.3}, {"params": [model.down.weight], "weight_decay": 0.5}]
    case = Example(sum_of_squares, model, AdamW(groups, lr=0.1), torch.randn(3, 4, dtype=torch.float64))
    step = case.capture()
    assert {source.name for source in step.graph.inputs if source.role == Role.RATE} == {"lr.0", "lr.1"}
    compare(step, case)
    case.optimizer.param_groups[1]["lr"] = 0.7  # a schedule needs no new capture
    compare(step, case)


@pytest.mark.parametrize("name", ["gpt", "mixtral", "vit", "cnn"])
def test_models_take_the_step_that_torch_takes(name: str) -> None:
    torch.manual_seed(2)
    layers = 1 if name in {"gpt", "mixtral"} else 0
    case = example(name, 4, layers=layers, dtype=torch.float64, device="cpu")
    step = case.capture()
    compare(step, case, tolerance=ADAM_TOLERANCE if name != "cnn" else TOLERANCE)
    assert {node.op for node in step.graph.nodes} <= set(TABLE), "every operation has signatures"
    assert_well_formed(step.graph)


def assert_well_formed(graph: Graph) -> None:
    """Values are made once, before they are used; phases come in order."""
    known = {source.value.name for source in graph.inputs}
    phases = [node.phase for node in graph.nodes]
    assert phases == sorted(phases, key=list(Phase).index)
    for node in graph.nodes:
        assert all(value.name in known for value in node.inputs), node
        fresh = {value.name for value in node.outputs}
        assert not fresh & known
        known |= fresh
    assert all(out.value.name in known for out in graph.outputs)


def test_a_model_of_published_size_costs_no_memory() -> None:
    case = example("llama3-70b", 8, layers=1)
    step = case.capture()
    sizes = {source.name: source.value.nbytes for source in step.graph.inputs if source.role == Role.PARAMETER}
    assert sum(sizes.values()) > 11e9
    assert all(parameter.is_meta for parameter in case.model.parameters())


def test_nodes_know_their_layer_and_their_module() -> None:
    graph = example("llama", 4, layers=2).capture().graph
    of_layer: dict[tuple[Phase, int], list[str]] = {}
    for node in graph.nodes:
        if node.layer is not None:
            assert node.layer[0] == "layers"
            of_layer.setdefault((node.phase, node.layer[1]), []).append(node.op)
    assert of_layer[Phase.FORWARD, 0] == of_layer[Phase.FORWARD, 1]
    assert of_layer[Phase.UPDATE, 0] == of_layer[Phase.UPDATE, 1]
    alike = [sorted(of_layer[Phase.BACKWARD, layer]) for layer in (0, 1)]
    assert alike[0] == alike[1]
    products = [node for node in graph.nodes if node.op == "aten.einsum.default"]
    backward = {node.module for node in products if node.phase == Phase.BACKWARD}
    assert {"layers.0.attention.query", "layers.1.mlp.down", "head"} <= backward
    # Tokens are not flattened: the batch of 4 and the 16 tokens are there in every product of a layer.
    of_layers = [node.inputs[0].shape for node in products if node.layer is not None]
    assert len(of_layers) == 2 * 7 * 3
    assert all(4 in shape and 16 in shape for shape in of_layers)


@pytest.mark.parametrize(
    ("merged", "apart", "groups"),
    [
        ((6, 4), (2, 3, 4), [(2, 3), (4,)]),
        ((6,), (1, 6), [(1, 6)]),
        ((6, 1), (6, 1), [(6,), (1,)]),
        ((24,), (2, 3, 4, 1), [(2, 3, 4, 1)]),
        ((6, 4), (4, 6), None),
        ((3, 8), (6, 4), None),
        ((), (), []),
    ],
)
def test_what_was_flattened(merged: tuple[int, ...], apart: tuple[int, ...], groups: Any) -> None:
    assert factors(merged, apart) == groups


def test_inputs_refuse_another_batch() -> None:
    case = example("mlp", 4, hidden=8, device="cpu")
    step = case.capture()
    with pytest.raises(UsageError, match=r"batch of shape \(4, 8\), not shape \(5, 8\)"):
        step.inputs(case.model, case.optimizer, torch.zeros(5, 8))
    with pytest.raises(UsageError, match="of the form"):
        step.inputs(case.model, case.optimizer, (torch.zeros(4, 8),))
    with pytest.raises(UsageError, match=r"needs the parameter 'up\.weight'"):
        step.graph.run({})


def test_batches_of_dicts_and_constants_and_writing_models() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            y = batch["x"] * self.weight
            y += torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            y[:, 0] = 0.5
            self.get_buffer("seen").add_(batch["x"].sum(0))
            return (y * batch["scale"]).sum()

    model = Odd()
    batch = {"x": torch.randn(2, 3, dtype=torch.float64), "scale": torch.randn(2, 1, dtype=torch.float64)}
    case = Example(lambda m, b: m(b), model, SGD(model.parameters(), 0.1), batch)
    step = case.capture()
    assert {s.name for s in step.graph.inputs if s.role == Role.BATCH} == {"batch.x", "batch.scale"}
    assert any(torch.equal(t, torch.tensor([1.0, 2.0, 3.0]).double()) for t in step.graph.constants.values())
    compare(step, case)
    assert step.graph.output(Role.BUFFER, "seen").value.shape == (3,)
    assert not model.get_buffer("seen").eq(0).all()


class Reader(nn.Module):
    """Does with the batch what it is told."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x) * self.weight


def branches(x: Tensor) -> Tensor:
    return x.sum() if x.sum() > 0 else -x.sum()


@pytest.mark.parametrize(
    ("read", "word"),
    [
        (branches, "looks at the value of a tensor"),
        (lambda x: x.sum() * x[0].item(), "looks at the value of a tensor"),
        (lambda x: x[x > 0].sum(), "a shape that depends on data"),
        (lambda x: torch.nonzero(x).sum(), "a shape that depends on data"),
        (lambda x: torch.from_numpy(x.numpy()).sum(), "cannot be traced"),
    ],
)
def test_code_that_depends_on_data_is_named_with_its_line(read: Callable[[Tensor], Tensor], word: str) -> None:
    model = Reader(read)
    with pytest.raises(CaptureError, match=word) as caught:
        capture(lambda m, b: m(b), model, SGD(model.parameters(), 0.1), torch.ones(4))
    line = read.__code__.co_firstlineno
    assert any(f"test_capture.py:{at} " in str(caught.value) for at in (line, line + 1)), caught.value
    assert caught.value.exit_code == 2


class Stranger(Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})


@pytest.mark.parametrize(
    ("optimizer", "word"),
    [
        (lambda p: RMSprop(p), "optimizer RMSprop cannot be captured; use one of SGD, Adam, AdamW"),
        (lambda p: Stranger(p), "Stranger"),
        (lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.5), "use dampening=0"),
        (lambda p: SGD([torch.nn.Parameter(torch.ones(2))], 0.1), "no parameter of the model"),
    ],
)
def test_optimizers_that_are_not_known_are_refused(optimizer: Callable[[Any], Optimizer], word: str) -> None:
    model = MLP(4)
    with pytest.raises(Unsupported, match=word):
        capture(sum_of_squares, model, optimizer(model.parameters()), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("loss_fn", "batch", "word"),
    [
        (lambda m, b: m(b), torch.ones(2, 4), r"scalar.*not shape \(2, 4\)"),
        (lambda m, b: b.sum(), torch.ones(2, 4), "depends on the optimizer's parameters"),
        (lambda m, b: 3.0, torch.ones(2, 4), "not float"),
        (lambda m, b: m(b[0]).sum(), (torch.ones(2, 4), 3), r"batch\.1 is a int"),
    ],
)
def test_losses_and_batches_of_the_wrong_kind_are_refused(loss_fn: Any, batch: Any, word: str) -> None:
    model = MLP(4)
    with pytest.raises(RingholdError, match=word) as caught:
        capture(loss_fn, model, SGD(model.parameters(), 0.1), batch)
    assert caught.value.exit_code == 2


def test_unused_parameters_stay() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "idle": nn.Linear(3, 1)})
    step = capture(lambda m, b: m.get_submodule("used")(b).sum(), model, AdamW(model.parameters()), torch.ones(2, 3))
    names = {out.name for out in step.graph.outputs if out.role == Role.PARAMETER}
    assert names == {"used.weight", "used.bias"}


def test_examples_are_checked() -> None:
    with pytest.raises(UsageError, match="no example 'resnet'"):
        example("resnet")
    with pytest.raises(UsageError, match="start at 1"):
        example("mlp", 0)


def test_capturing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example("mlp", 2, hidden=4).capture()
