"""Language models: GPT, Llama, Mixtral. Token ids (batch, length), int64, to logits (batch, length, vocabulary)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.models.transformer import Attention, Perceptron, RMSNorm, SwiGLU, rotary_angles


@dataclass(frozen=True, slots=True)
class Size:
    """Of a language model: `groups` heads of keys and values serve `heads` of queries; `experts` of a mixture."""

    layers: int
    width: int
    heads: int
    groups: int
    hidden: int
    vocabulary: int
    length: int
    experts: int = 0
    chosen: int = 2
    capacity: float = 1.25


class GPTBlock(nn.Module):
    """Attention and perceptron behind layer norms, with biases."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(size.width, size.heads, size.groups, bias=True)
        self.norm = nn.LayerNorm(size.width)
        self.mlp = Perceptron(size.width, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, the head tied to the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.layers = nn.ModuleList(GPTBlock(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each next token."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Mixture(nn.Module):
    """Experts of which each token takes some (Mixtral, arXiv 2401.04088), in the dense form of GShard (2006.16668).

    Each sequence of the batch is a group of tokens; an expert takes at most `capacity` times its fair share of the
    tokens of a group, first come first served, so that all shapes are known before. Dispatch and return are einsums
    with (batch, token, expert, slot) tables.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.chosen = size.chosen
        self.slots = max(1, int(size.capacity * size.chosen * size.length / size.experts))
        self.router = nn.Linear(size.width, size.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(size.experts, size.width, size.hidden))
        self.up = nn.Parameter(torch.empty(size.experts, size.width, size.hidden))
        self.down = nn.Parameter(torch.empty(size.experts, size.hidden, size.width))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        dispatch, weights = self._routes(x)
        taken = torch.einsum("btes,btw->ebsw", dispatch, x)
        hidden = F.silu(torch.einsum("ebsw,ewh->ebsh", taken, self.gate)) * torch.einsum(
            "ebsw,ewh->ebsh", taken, self.up
        )
        made = torch.einsum("ebsh,ehw->ebsw", hidden, self.down)
        return torch.einsum("btes,ebsw->btw", weights, made)

    def _routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, token, expert, slot): whether a token goes there (0 or 1), and with which weight."""
        scores = self.router(x)
        best, experts = torch.topk(scores, self.chosen, dim=-1)
        shares = best.softmax(-1)
        known = torch.arange(scores.shape[-1], device=x.device)
        picked = (experts.unsqueeze(-1) == known).to(x.dtype)  # (batch, token, choice, expert)
        wanted = picked.sum(2)
        share = (picked * shares.unsqueeze(-1)).sum(2)
        place = wanted.cumsum(1) - wanted  # how many came before
        slots = torch.arange(self.slots, device=x.device, dtype=x.dtype)
        dispatch = (place.unsqueeze(-1) == slots).to(x.dtype) * wanted.unsqueeze(-1)
        return dispatch, dispatch * share.unsqueeze(-1)


class LlamaBlock(nn.Module):
    """Attention and gated perceptron, or a mixture of them, behind RMS norms."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(size.width)
        self.attention = Attention(size.width, size.heads, size.groups)
        self.norm = RMSNorm(size.width)
        self.mlp = Mixture(size) if size.experts else SwiGLU(size.width, size.hidden)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(batch, length, width) to the same."""
        x = x + self.attention(self.attention_norm(x), angles)
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Llama(nn.Module):
    """Llama (arXiv 2302.13971, 2407.21783): rotary positions, grouped queries, SwiGLU; with `experts`: Mixtral."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(LlamaBlock(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        cosines, sines = rotary_angles(size.length, size.width // size.heads)
        self.register_buffer("cosines", cosines.to(self.head.weight.dtype), persistent=False)
        self.register_buffer("sines", sines.to(self.head.weight.dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each next token."""
        x = self.tokens(ids)
        angles = (self.get_buffer("cosines")[: ids.shape[1]], self.get_buffer("sines")[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, angles)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of targets (batch, length) given ids (batch, length)."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
