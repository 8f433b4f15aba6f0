"""Parts that the transformers share: norms, rotary positions, attention, perceptrons. All in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the width, to the same."""
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def rotary_angles(length: int, features: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each (length, features) (Su et al., arXiv 2104.09864)."""
    frequencies = base ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the features of (batch, heads, length, features), the first half paired with the second."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


class Attention(nn.Module):
    """Attention with as many key heads as wanted, causal or not: (batch, length, width) to the same.

    With `rotary` positions where it is called with angles. Biases as in GPT where `bias`. Heads of `features`,
    if these are not width / heads.
    """

    def __init__(
        self, width: int, heads: int, groups: int, causal: bool = True, bias: bool = False, features: int = 0
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.features, self.causal = heads, groups, features or width // heads, causal
        self.query = nn.Linear(width, heads * self.features, bias=bias)
        self.key = nn.Linear(width, groups * self.features, bias=bias)
        self.value = nn.Linear(width, groups * self.features, bias=bias)
        self.out = nn.Linear(heads * self.features, width, bias=bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend."""
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, self.features).transpose(1, 2)
        key = self.key(x).view(batch, length, self.groups, self.features).transpose(1, 2)
        value = self.value(x).view(batch, length, self.groups, self.features).transpose(1, 2)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        grouped = self.groups < self.heads
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=grouped)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class SwiGLU(nn.Module):
    """Gated perceptron (Shazeer, arXiv 2002.05202): (..., width) to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Perceptron(nn.Module):
    """Two layers with a GELU between: (..., width) to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out
