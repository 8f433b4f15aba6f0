"""Steps as users write them: captured, run by drawn plans on ranks that are threads, and compared with torch itself."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from collectives.errors import CaptureError, RingholdError
from parallel.capturing import LossFunction, capture
from parallel.executing import execute
from parallel.graph import Role
from parallel.layout import Layout, Mesh
from parallel.plans import Plan
from parallel.resharding import reshard
from parallel.signatures.lookup import UnknownOperation
from tests.parallel.pretend import together
from tests.parallel.random_plans import draw_plan

TOLERANCE = 1e-10
"""fp64, of values around 1."""
MESHES = (Mesh.of(x=3), Mesh.of(x=2, y=2))
Made = tuple[LossFunction, nn.Module, Any]


def _linear(last: int, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, last), *more).double()


def one_column() -> Made:
    """The gradient of a bias of one element is a sum over a view that only drops a dimension."""
    return lambda m, b: m(b).squeeze(-1).square().sum(), _linear(1), torch.randn(8, 5).double()


def group_norm_without_gain() -> Made:
    """Sums over dimensions of size 1."""
    return lambda m, b: F.group_norm(m(b), 2).pow(3).sum(), _linear(6), torch.randn(8, 5).double()


def constants_of_the_function() -> Made:
    weight, teacher = torch.rand(6).double(), _linear(6)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        labels = teacher(batch).argmax(-1)
        return F.cross_entropy(model(batch), labels, weight=weight)

    return loss, _linear(6), torch.randn(8, 5).double()


class Averaged(nn.Module):
    """Keeps a running mean in a buffer that it binds anew."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("still", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean


def a_buffer_bound_anew() -> Made:
    return lambda m, b: m(b).square().sum(), Averaged().double(), torch.randn(8, 5).double()


def masked_attention_by_hand() -> Made:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        q, k, v = model(x).view(4, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)
        hidden = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
        return torch.as_tensor((scores.softmax(-1) @ v).square().sum())

    return loss, nn.Linear(8, 48).double(), torch.randn(4, 6, 8).double()


def products_of_three() -> Made:
    """Torch takes them as products of matrices with dimensions of size 1."""
    return (
        lambda m, b: torch.einsum("bi,ij,bj->b", m(b), torch.eye(6).double(), m(b)).sum(),
        _linear(6),
        torch.randn(8, 5).double(),
    )


def largest_elements() -> Made:
    """Their gradients look for what equals them: on four ranks, sums in two orders would not."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return torch.as_tensor(y.amax((0, 1)) + y.max() + torch.where(y >= y.amax(-1, True), y, 0).sum())

    return loss, _linear(6), torch.randn(8, 5).double()


def written_slices() -> Made:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x).clone()
        y[:, 0] = 0
        y[1] = y[2]
        y[:, 2:4] += 1
        return torch.as_tensor(y.square().sum())

    return loss, _linear(6), torch.randn(8, 5).double()


def complex_rotations() -> Made:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        turns = torch.polar(torch.ones(8, 3).double(), torch.outer(torch.arange(8.0), torch.arange(3.0)).double())
        pairs = torch.view_as_complex(model(x).view(8, 3, 2))
        return torch.as_tensor(torch.view_as_real(pairs * turns)[..., 0].pow(3).sum())

    return loss, _linear(6), torch.randn(8, 5).double()


def frozen_in_part() -> Made:
    """The optimizer is given all parameters, as `SGD(model.parameters())` does."""
    model = _linear(6, nn.Tanh(), nn.Linear(6, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return lambda m, b: m(b).square().sum(), model, torch.randn(8, 5).double()


def other_losses() -> Made:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        pixels = F.cross_entropy(y.view(2, 6, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long))
        smooth = F.huber_loss(y, y.detach().flip(0), delta=0.3) + F.soft_margin_loss(y, torch.ones_like(y))
        return pixels + smooth + F.binary_cross_entropy(y.sigmoid(), torch.full_like(y, 0.3)) + y.abs().sum()

    return loss, _linear(6), torch.randn(8, 5).double()


STEPS: list[Callable[[], Made]] = [
    one_column,
    group_norm_without_gain,
    constants_of_the_function,
    a_buffer_bound_anew,
    masked_attention_by_hand,
    products_of_three,
    largest_elements,
    written_slices,
    complex_rotations,
    frozen_in_part,
    other_losses,
]


def _whole(plan: Plan, inputs: dict[str, Tensor]) -> dict[tuple[Role, str], Tensor]:
    """Run a plan; all outputs, whole."""
    size = plan.mesh.size
    results, moved = together(size, lambda comm: execute(plan, comm, inputs))
    assert moved == sum(reshard.nbytes for reshard in plan.reshards) > 0

    def gathered(comm: Any) -> dict[tuple[Role, str], Tensor]:
        found, whole = results[comm.rank], Layout.replicated(plan.mesh)
        return {
            (out.role, out.name): reshard(Layout(plan.mesh, placed), whole, out.value.shape, size).run(
                comm, found[out.role, out.name]
            )
            for out, placed in zip(plan.graph.outputs, plan.ends, strict=True)
        }

    return together(size, gathered)[0][0]


@pytest.mark.parametrize("make", STEPS, ids=lambda make: make.__name__)
def test_a_users_step_gives_what_torch_gives(make: Callable[[], Made]) -> None:
    torch.manual_seed(4)
    loss_fn, model, batch = make()
    optimizer = SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownOperation)
        step = capture(loss_fn, model, optimizer, batch)
        plans = [draw_plan(step.graph, mesh, random.Random(3)) for mesh in MESHES]
    inputs = {name: tensor.detach().clone() for name, tensor in step.inputs(model, optimizer, batch).items()}
    found = [_whole(plan, inputs) for plan in plans]
    loss = loss_fn(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    expected = {(Role.LOSS, "loss"): loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected[Role.GRADIENT, name], expected[Role.PARAMETER, name] = parameter.grad, parameter.detach()
    changed = {name: buffer for name, buffer in model.named_buffers() if not torch.equal(buffer, inputs[name])}
    expected.update({(Role.BUFFER, name): buffer for name, buffer in changed.items()})
    for results in found:
        assert set(results) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(results[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=str(key))


def test_means_of_a_norm_in_half_precision_have_the_dtype_that_torch_gives_them() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.as_tensor(model(batch).float().square().sum())

    optimizer, batch = SGD(model.parameters(), 0.1), torch.randn(8, 8)
    step = capture(loss, model, optimizer, batch)
    norm = next(node for node in step.graph.nodes if "native_layer_norm." in node.op)
    assert [value.dtype for value in norm.outputs] == [torch.bfloat16, torch.float32, torch.float32]
    inputs = {name: tensor.detach() for name, tensor in step.inputs(model, optimizer, batch).items()}
    found = _whole(draw_plan(step.graph, MESHES[0], random.Random(1)), inputs)
    expected = step.graph.run(inputs)
    for key, value in expected.items():
        # Of bf16, which keeps 8 bits; terms of a few units are rounded on each rank.
        torch.testing.assert_close(found[key], value, rtol=0.1, atol=0.1, msg=str(key))


class Counting(nn.Module):
    """Writes into a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(5, 6), torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return torch.as_tensor(self.layer(x) * self.count)


class Elsewhere(Counting):
    """Holds a tensor of another device."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x) * torch.ones(6, device="meta"))


def accumulating(model: nn.Module, batch: Tensor) -> Tensor:
    model(batch).sum().backward()
    return torch.as_tensor(model(batch).sum())


def reentrant(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.as_tensor(checkpoint(model, batch.requires_grad_(), use_reentrant=True).sum())


@pytest.mark.parametrize(
    ("loss_fn", "model", "batch", "message"),
    [
        (lambda m, b: m(b).sum(), Counting(), torch.ones(2, 5), r"writes into a tensor of shape \[6\] .*register_buf"),
        (lambda m, b: m(b).sum(), Elsewhere(), torch.ones(2, 5), r"is on another device; make it a buffer"),
        (lambda m, b: m(b).sum().detach(), nn.Linear(5, 6), torch.ones(2, 5), "no gradient flows through"),
        (lambda m, b: m(b).sum(), nn.Linear(5, 6), torch.ones(0, 5), r"batch of shape \[0, 5\] has no elements"),
        (reentrant, nn.Linear(5, 6), torch.ones(2, 5), "use use_reentrant=False"),
        (accumulating, nn.Linear(5, 6), torch.ones(2, 5), "calls backward by itself.*return the sum"),
        (nn.MSELoss(), nn.Linear(5, 6), torch.ones(2, 5), r"MSELoss is not made for; write a function"),
    ],
)
def test_what_would_be_lost_or_mixed_up_is_refused(
    loss_fn: LossFunction, model: nn.Module, batch: Tensor, message: str
) -> None:
    with pytest.raises(RingholdError, match=message) as caught:
        capture(loss_fn, model, SGD(model.parameters(), 0.1), batch)
    assert caught.value.exit_code == 2
    assert "capturing.py" not in str(caught.value)
    assert isinstance(caught.value, CaptureError) or "parallel/" not in str(caught.value)


def test_arguments_in_another_order_are_refused() -> None:
    model: Any = nn.Linear(5, 6)
    with pytest.raises(RingholdError, match="in this order; here is loss_fn a Linear, model a SGD, optimizer a funct"):
        capture(model, SGD(model.parameters(), 0.1), lambda m, b: m(b).sum(), torch.ones(2, 5))  # type: ignore[arg-type]
