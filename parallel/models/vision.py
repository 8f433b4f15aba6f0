"""Image models: a Vision Transformer and a convolutional network. (batch, 3, size, size) to logits (batch, classes)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.models.transformer import Attention, Perceptron


class EncoderBlock(nn.Module):
    """Attention to all patches and a perceptron, behind layer norms."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, heads, causal=False, bias=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = Perceptron(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, width) to the same."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) with a class token and learned positions."""

    def __init__(self, image: int, patch: int, layers: int, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.layers = nn.ModuleList(EncoderBlock(width, heads, 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each class."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class CNN(nn.Module):
    """Two convolutions with batch norms and pooling, and a linear head."""

    def __init__(self, image: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each class."""
        x = F.max_pool2d(F.relu(self.first_norm(self.first(images))), 2)
        x = F.relu(self.second_norm(self.second(x)))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of classes (batch,) given images."""
    images, classes = batch
    return F.cross_entropy(model(images), classes)
