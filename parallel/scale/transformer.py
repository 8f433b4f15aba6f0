"""A decoder-only transformer by its numbers: what it computes and how many parameters it has.

The cost model in `layer.py` and `memory.py` reads it; `models/*.json` holds some that are published.
"""

from typing import Self

import msgspec

from collectives.errors import UsageError
from parallel.scale import files
from parallel.scale.huggingface import numbers


class Transformer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Numbers of a model of the GPT or the Llama kind, dense or a mixture of experts.

    Raises:
        UsageError: a number is not positive, or does not divide what it has to.

    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    """Width between the two (or, gated, three) matrices of a feed-forward block, of one expert."""
    vocab: int
    seq: int
    """Tokens of a sequence."""
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as `heads`."""
    head_dim: int = 0
    """Width of a head; 0: hidden / heads."""
    gated: bool = False
    """Feed-forward blocks of three matrices (SwiGLU)."""
    experts: int = 1
    top_k: int = 1
    """Experts that a token visits."""
    tied: bool = False
    """Whether the output layer shares the embedding's weights."""
    dropout: bool = False
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "ffn", "vocab", "seq", "experts", "top_k"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not self.head_dim and self.hidden % self.heads:
            raise UsageError(f"hidden {self.hidden} is no multiple of {self.heads} heads; give the width of a head")
        if self.kv_heads < 0 or self.head_dim < 0 or self.heads % self.groups:
            raise UsageError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys and values")
        if self.top_k > self.experts:
            raise UsageError(f"a token cannot visit {self.top_k} of {self.experts} experts")

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a model that ships by its name, or one of the user's by its path, also a `config.json` of Hugging Face.

        Raises:
            UsageError: it cannot be read, or is of a kind that this is no model of.

        """
        return files.read("models", name, cls, numbers)

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def queries(self) -> int:
        """Width of all heads together."""
        return self.heads * self.width

    @property
    def matrices(self) -> int:
        """Matrices of a feed-forward block."""
        return 3 if self.gated else 2

    @property
    def attention_parameters(self) -> int:
        """Parameters of a layer outside its experts: attention, norms, the router."""
        projections = self.hidden * (2 * self.queries + 2 * self.groups * self.width)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return projections + 2 * self.hidden + router

    @property
    def expert_parameters(self) -> int:
        """Parameters of one feed-forward block."""
        return self.matrices * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer."""
        return self.attention_parameters + self.experts * self.expert_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * self.layer_parameters + embeddings + self.hidden

    @property
    def layer_flops(self) -> float:
        """FLOPs of a layer's forward pass for one sequence; attention counted in full, not halved for the causal mask.

        That is how the published tables count (arXiv 2104.04473, 2205.05198).
        """
        per_token = self.hidden * (2 * self.queries + 2 * self.groups * self.width)
        per_token += self.top_k * self.expert_parameters
        return 2.0 * self.seq * per_token + 4.0 * self.seq**2 * self.queries

    @property
    def head_flops(self) -> float:
        """FLOPs of the output layer's forward pass for one sequence."""
        return 2.0 * self.seq * self.hidden * self.vocab

    @property
    def flops(self) -> float:
        """FLOPs of a training step for one sequence: forward, and twice that backward."""
        return 3.0 * (self.layers * self.layer_flops + self.head_flops)
