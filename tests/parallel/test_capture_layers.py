"""Layers and losses that users' models are made of: captured as torch computes them, of operations with signatures."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from parallel.capturing import capture
from parallel.graph import Role
from parallel.signatures.table import TABLE

TOLERANCE = 1e-11
"""fp64, of values up to a hundred."""


class Wrapped(nn.Module):
    """A layer and what is done with it; `weight` for what has no layer."""

    def __init__(self, layer: nn.Module | None, use: Callable[["Wrapped", Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer or nn.Identity()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x) + 0 * self.weight.sum()


def squared(m: Wrapped, x: Tensor) -> Tensor:
    y: Tensor = m.layer(x)
    return (y * y).sum()


def masked_attention(m: Wrapped, x: Tensor) -> Tensor:
    scores = m.layer(x) @ x.transpose(-1, -2)
    hidden = torch.ones(x.shape[-2], x.shape[-2]).triu(1).bool()
    y: Tensor = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x
    return (y * y).sum()


def extremes(y: Tensor) -> Tensor:
    lengths: Tensor = y.norm(dim=-1)
    return lengths.sum() + y.std() + y.max() + y.min() + y.logsumexp(0).sum()


def recomputed(m: Wrapped, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(lambda z: torch.tanh(m.layer(z)), x, use_reentrant=False)
    return (y * x).sum()


def moved_about(m: Wrapped, x: Tensor) -> Tensor:
    y = torch.roll(m.layer(x), 1, 0) + torch.flip(x, [1])
    return (torch.stack([*y.unbind(0), x[0]]).repeat(2, 1)[1:, ::2] ** 3).sum()


def of_integers(use: Callable[[Wrapped, Tensor], Tensor]) -> Callable[[Wrapped, Tensor], Tensor]:
    """Give the model integers below 5 made of its floats."""
    return lambda m, x: use(m, x[..., 0].abs().mul(3).long().clamp(max=4))


CASES: dict[str, tuple[Callable[[], nn.Module] | None, Callable[[Wrapped, Tensor], Tensor], tuple[int, ...]]] = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), squared, (3, 4, 8)),
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), squared, (3, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), squared, (3, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 8), squared, (3, 8, 5)),
    "instance norm": (lambda: nn.InstanceNorm1d(8, affine=True), squared, (3, 8, 5)),
    "batch norm, evaluated": (lambda: nn.BatchNorm1d(8).eval(), squared, (3, 8)),
    "recurrent": (lambda: nn.GRU(8, 8), lambda m, x: m.layer(x)[0].sum(), (3, 2, 8)),
    "convolution": (lambda: nn.Conv1d(8, 4, 3), squared, (3, 8, 9)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 4, 3), squared, (3, 4, 5, 5)),
    "one hot": (None, of_integers(lambda m, x: (F.one_hot(x, 5).double() @ m.weight).pow(2).sum()), (6, 2)),
    "indexed": (None, of_integers(lambda m, x: m.weight[x].pow(2).sum() + m.weight[:, x].pow(3).sum()), (6, 2)),
    "binary loss": (
        lambda: nn.Linear(8, 8),
        lambda m, x: F.binary_cross_entropy_with_logits(m.layer(x), x.sigmoid()),
        (3, 8),
    ),
    "smoothed loss": (
        lambda: nn.Linear(8, 5),
        lambda m, x: F.cross_entropy(m.layer(x), (x[:, 0] > 0).long(), label_smoothing=0.1),
        (3, 8),
    ),
    "smooth L1 loss": (lambda: nn.Linear(8, 8), lambda m, x: F.smooth_l1_loss(m.layer(x), x), (3, 8)),
    "masked attention": (lambda: nn.Linear(8, 8), masked_attention, (3, 2, 4, 8)),
    "lengths and extremes": (
        lambda: nn.Linear(8, 8),
        lambda m, x: (
            m.layer(x).norm(dim=-1).sum() + m.layer(x).std() + m.layer(x).max() + m.layer(x).logsumexp(0).sum()
        ),
        (3, 8),
    ),
    "moved about": (lambda: nn.Linear(8, 8), moved_about, (3, 8)),
    "recomputed": (lambda: nn.Linear(8, 8), recomputed, (3, 8)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_layer_is_what_torch_computes(name: str) -> None:
    layer, use, shape = CASES[name]
    torch.manual_seed(4)
    model = Wrapped(layer() if layer else None, use).double()
    batch = torch.randn(shape, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    step = capture(lambda m, b: m(b), model, optimizer, batch)
    assert {node.op for node in step.graph.nodes} - set(TABLE) == set()
    inputs = {name: tensor.detach().clone() for name, tensor in step.inputs(model, optimizer, batch).items()}
    torch.manual_seed(5)  # of dropout
    results = step.graph.run(inputs)
    torch.manual_seed(5)
    loss = model(batch)
    loss.backward()
    torch.testing.assert_close(results[Role.LOSS, "loss"], loss.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    for path, parameter in model.named_parameters():
        found = results[Role.GRADIENT, path]
        torch.testing.assert_close(found, parameter.grad, rtol=TOLERANCE, atol=TOLERANCE, msg=path)
