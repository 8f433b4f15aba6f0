"""How a training step is divided among devices: data, tensor, pipeline, context and expert parallelism."""

from typing import Literal

import msgspec

from collectives.errors import UsageError
from parallel.scale.transformer import Transformer

Recompute = Literal["none", "selective", "full"]
Attention = Literal["auto", "flash", "unfused"]
Precision = Literal["bf16", "fp8"]
ExpertRanks = Literal["near", "far"]


class Strategy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A division of a step. Experts are divided among the ranks of the data and context axes, `ep` of them.

    Ranks are numbered with tensor parallelism fastest, then context, data, and pipeline, as Megatron-LM does.

    Raises:
        UsageError: a number is not positive, or the batch does not divide.

    """

    batch: int
    """Sequences of a step, of all devices together."""
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    microbatch: int = 1
    """Sequences that go through the pipeline at a time."""
    interleave: int = 1
    """Parts of the model that a device of the pipeline holds (virtual stages)."""
    recompute: Recompute = "none"
    """What a backward pass computes again: nothing, the inside of attention, whole layers."""
    sequence_parallel: bool = True
    """Norms and residuals split along the sequence among tensor-parallel ranks (arXiv 2205.05198)."""
    zero: int = 1
    """What data parallelism shards: 0 nothing, 1 optimizer, 2 gradients too, 3 parameters too (arXiv 1910.02054)."""
    attention: Attention = "auto"
    """`unfused` writes the scores to memory; `auto`: as the cluster's software does."""
    precision: Precision = "bf16"
    """Of the large matrix products."""
    expert_ranks: ExpertRanks = "near"
    """Ranks of an expert group: next to each other (folded, arXiv 2504.14960), or a context group apart."""
    gradient_bytes: int = 0
    """Bytes of a gradient in memory and on the wire; 0: as the cluster's software has them."""

    def __post_init__(self) -> None:
        for field in ("batch", "dp", "tp", "pp", "cp", "ep", "microbatch", "interleave"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not 0 <= self.zero <= 3:
            raise UsageError(f"zero is 0, 1, 2 or 3, not {self.zero}")
        if self.batch % (self.dp * self.microbatch):
            step = self.dp * self.microbatch
            near = " or ".join(str(size) for size in (self.batch // step * step, -(-self.batch // step) * step) if size)
            raise UsageError(
                f"a batch of {self.batch} is no multiple of dp {self.dp} x microbatch {self.microbatch}; "
                f"{near} would be"
            )

    def __str__(self) -> str:
        parts = [f"dp={self.dp} tp={self.tp} pp={self.pp} cp={self.cp} ep={self.ep} mbs={self.microbatch}"]
        parts += [f"v={self.interleave}"] * (self.interleave > 1)
        parts += [f"recompute={self.recompute}"] * (self.recompute != "none")
        return " ".join(parts)

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def microbatches(self) -> int:
        """Microbatches of a step, on each data-parallel rank."""
        return self.batch // (self.dp * self.microbatch)

    def check(self, model: Transformer) -> None:
        """Raise `UsageError` if this model cannot be divided so, saying by what and why."""
        if self.interleave > 1 and self.pp == 1:
            raise UsageError("interleave divides the layers of pipeline stages; there is only one stage (pp 1)")
        if self.interleave > 1 and self.microbatches % self.pp:
            raise UsageError(
                f"an interleaved pipeline takes its microbatches {self.pp} at a time; {self.microbatches} do not divide"
            )
        if self.pp * self.interleave > model.layers + 2:
            raise UsageError(f"{model.layers} layers do not fill pp {self.pp} x interleave {self.interleave} stages")
        if model.heads % self.tp or model.ffn % self.tp:
            raise UsageError(
                f"tp {self.tp} does not divide {model.heads} heads and a feed-forward width of {model.ffn}"
            )
        if model.seq % (self.cp * (2 if self.cp > 1 else 1)):
            raise UsageError(f"cp {self.cp} does not divide a sequence of {model.seq} in two parts a rank")
        if model.experts % self.ep or (self.dp * self.cp) % self.ep:
            raise UsageError(
                f"ep {self.ep} must divide {model.experts} experts and the {self.dp * self.cp} ranks of dp x cp"
            )
