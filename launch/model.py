"""A small GPT over bytes, in plain torch: the model that the training job trains.

Built by `launch.trainer`. Pre-norm blocks, causal attention, learned positions, head tied to the embedding, no biases
(the bias of a key has no gradient but rounding noise, which Adam would blow up to full-sized steps). Nothing in it
draws random numbers once it is built, so a step's result depends on its samples alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collectives.errors import UsageError
from launch.config import DType, Preset

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a model: `width` features, of which `heads` share in attention, in `layers` blocks."""

    width: int
    heads: int
    layers: int


PRESETS: dict[Preset, Shape] = {
    "tiny": Shape(32, 2, 1),
    "1m": Shape(192, 6, 2),
    "10m": Shape(384, 6, 6),
    "100m": Shape(768, 12, 14),
}
"""Models by their rough number of parameters; "tiny" has 23 thousand, for trying things out."""
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "fp64": torch.float64}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the residual stream. (batch, length, width) both ways."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width, bias=False, dtype=dtype)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False, dtype=dtype)
        self.attention_out = nn.Linear(width, width, bias=False, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(width, bias=False, dtype=dtype)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False, dtype=dtype)
        self.mlp_out = nn.Linear(4 * width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        batch, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return out


class GPT(nn.Module):
    """Next-byte model: token ids (batch, length <= context), int64 -> logits (batch, length, 256)."""

    def __init__(self, shape: Shape, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Parameter(torch.empty(VOCABULARY, shape.width, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(context, shape.width, dtype=dtype))
        self.blocks = nn.ModuleList(Block(shape, dtype) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of each next byte.

        Raises:
            UsageError: `ids` is longer than the context.

        """
        if ids.shape[1] > self.context:
            raise UsageError(f"{ids.shape[1]} tokens do not fit the model's context of {self.context}; pass fewer")
        x = F.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, the tied one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def build(shape: Shape, context: int, dtype: torch.dtype, generator: torch.Generator) -> GPT:
    """Return an untrained model; the same generator state gives the same bits.

    Matrices are normal with std 0.02, those that write to the residual stream 0.02/sqrt(2*layers), as in GPT-2 (Radford
    et al., 2019). The embedding's rows have unit length on average, much more than positions add or a few steps move:
    in GPT-2 both start at std 0.02, so that some byte at some place sums to almost nothing, and the norm that follows
    blows its gradient up. Rounding then grows a thousandfold in a single step, and with it all that tells one division
    of the batch from another. The last norm starts at 0.5 to keep the first predictions, by such rows, modest.
    """
    # torch's modules draw values, which are replaced below, from the global generator: that belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        model = GPT(shape, context, dtype)
    into_residual = 0.02 / math.sqrt(2 * shape.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 0.5 if name == "norm.weight" else 1.0)
        elif name == "tokens":
            nn.init.normal_(parameter, std=shape.width**-0.5, generator=generator)
        else:
            std = into_residual if name.endswith(("attention_out.weight", "mlp_out.weight")) else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


@torch.no_grad()
def generate(model: GPT, prompt: bytes, length: int, generator: torch.Generator, temperature: float = 0.8) -> bytes:
    """Let the model go on from `prompt` (not empty) for `length` bytes; return prompt and continuation.

    Each byte is drawn from the softmax over the logits divided by `temperature`.
    """
    text = torch.tensor(list(prompt), dtype=torch.int64)
    for _ in range(length):
        logits = model(text[-model.context :].unsqueeze(0))[0, -1]
        drawn = torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator)
        text = torch.cat((text, drawn))
    return bytes(text.tolist())
