"""The shipped examples by name: a model, its loss, an optimizer and a batch. Used by `ringhold plan` and the tests.

`mlp` is the two-layer perceptron without biases on which Megatron's choice between data and tensor parallel can be
computed by hand. The others come in a small size and in published ones (`gpt2`, `llama3-8b`, `mixtral-8x7b`, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from collectives.errors import UsageError
from parallel.capturing import Step, capture
from parallel.models.language import GPT, Llama, Size, next_token_loss
from parallel.models.vision import CNN, ViT, class_loss


@dataclass(frozen=True)
class Example:
    """What `capture` takes."""

    loss_fn: Callable[[nn.Module, Any], Tensor]
    model: nn.Module
    optimizer: Optimizer
    batch: Any

    def capture(self) -> Step:
        """Capture the training step."""
        return capture(self.loss_fn, self.model, self.optimizer, self.batch)


LANGUAGE: dict[str, tuple[type[GPT] | type[Llama], Size]] = {
    "gpt": (GPT, Size(2, 64, 4, 4, 256, 128, 16)),
    "gpt2": (GPT, Size(12, 768, 12, 12, 3072, 50_257, 1024)),
    "llama": (Llama, Size(2, 64, 8, 4, 128, 128, 16)),
    "llama3-8b": (Llama, Size(32, 4096, 32, 8, 14_336, 128_256, 8192)),
    "llama3-70b": (Llama, Size(80, 8192, 64, 8, 28_672, 128_256, 8192)),
    "mixtral": (Llama, Size(2, 64, 8, 4, 128, 128, 16, experts=4)),
    "mixtral-8x7b": (Llama, Size(32, 4096, 32, 8, 14_336, 32_000, 4096, experts=8)),
}
"""Language models by name. Those of published size have the length that they were trained with."""
VISION: dict[str, Callable[[], tuple[nn.Module, int, int]]] = {
    "vit": lambda: (ViT(32, 8, 2, 64, 4, 10), 32, 10),
    "vit-b16": lambda: (ViT(224, 16, 12, 768, 12, 1000), 224, 1000),
    "cnn": lambda: (CNN(16, 8, 10), 16, 10),
}
NAMES = ("mlp", *LANGUAGE, *VISION)


class MLP(nn.Module):
    """Two linear layers without biases and a ReLU between: (batch, hidden) to the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, hidden, bias=False)
        self.down = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


def sum_of_squares(model: nn.Module, batch: Tensor) -> Tensor:
    """Half the squared length of all outputs: a loss whose gradient is the output itself."""
    out: Tensor = model(batch)
    return 0.5 * out.square().sum()


def example(
    name: str,
    batch: int = 8,
    *,
    hidden: int = 0,
    layers: int = 0,
    length: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "meta",
    optimizer: Callable[..., Optimizer] | None = None,
) -> Example:
    """Build an example.

    Args:
        name: one of `NAMES`.
        batch: samples in a batch.
        hidden: width of the MLP.
        layers, length: of a language model, instead of its own (0).
        dtype: of parameters and images.
        device: "meta" for capture alone; "cpu" to run it, with values from torch's default generator.
        optimizer: takes the parameters; default SGD for the MLP and the CNN, AdamW for the others.

    Raises:
        UsageError: there is no such example, or a size is out of range.

    """
    if name not in NAMES:
        raise UsageError(f"there is no example {name!r}; there are {', '.join(NAMES)}")
    if batch < 1 or min(hidden, layers, length) < 0:
        raise UsageError(f"sizes of an example start at 1, not batch {batch}, hidden {hidden}, layers {layers}")
    with torch.device(device):
        loss_fn, model, inputs = _built(name, batch, hidden, layers, length, dtype)
    make = optimizer or (_sgd if name in {"mlp", "cnn"} else _adamw)
    return Example(loss_fn, model, make(model.parameters()), inputs)


def _sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=3e-4)


def _built(
    name: str, batch: int, hidden: int, layers: int, length: int, dtype: torch.dtype
) -> tuple[Callable[[nn.Module, Any], Tensor], nn.Module, Any]:
    """Loss, model and batch, on the device in force."""
    if name == "mlp":
        return sum_of_squares, MLP(hidden or 128).to(dtype), torch.randn(batch, hidden or 128, dtype=dtype)
    if name in LANGUAGE:
        kind, size = LANGUAGE[name]
        size = replace(size, layers=layers or size.layers, length=length or size.length)
        ids = torch.randint(size.vocabulary, (2, batch, size.length))
        return next_token_loss, kind(size).to(dtype), (ids[0], ids[1])
    model, image, classes = VISION[name]()
    images = torch.randn(batch, 3, image, image, dtype=dtype)
    return class_loss, model.to(dtype), (images, torch.randint(classes, (batch,)))
