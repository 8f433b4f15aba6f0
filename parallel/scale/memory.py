"""The memory that a device needs at its peak: parameters, gradients, optimizer, activations.

Activations are those of arXiv 2205.05198, table 2, taken apart by tensor so that gated blocks, grouped heads and
experts follow too; the number of microbatches in flight is that of the pipeline's schedule.
"""

from dataclasses import dataclass

from parallel.scale.layer import HALF, Layers
from parallel.scale.pipeline import split_layers

_ADAM = 12
"""Bytes a parameter: a 32-bit copy and two moments."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device, of the stage that needs the most."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    reserved: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.reserved


def peak(layers: Layers) -> Memory:
    """Memory of the first or the last stage of the pipeline, whichever needs more."""
    pp = layers.strategy.pp
    return max((_stage(layers, stage) for stage in {0, pp - 1}), key=lambda memory: memory.total)


def held(layers: Layers, stage: int) -> tuple[float, float]:
    """Parameters of a stage on one device, before data parallelism shards them: of experts, and all others."""
    model, strategy = layers.model, layers.strategy
    parts = split_layers(model.layers, strategy.pp * strategy.interleave)
    count = sum(parts[stage :: strategy.pp])
    tables = (stage == 0) + (stage == strategy.pp - 1 and not (model.tied and strategy.pp == 1))
    dense = count * model.attention_parameters / strategy.tp + tables * model.vocab * model.hidden / strategy.tp
    experts = model.experts * model.expert_parameters / strategy.tp
    if model.experts == 1:
        return 0.0, dense + count * experts
    return count * experts / strategy.ep, dense


def activations(layers: Layers) -> float:
    """Bytes that a layer keeps of one microbatch for its backward pass, if it recomputes nothing but scores."""
    model, strategy, n = layers.model, layers.strategy, layers.tokens
    t = strategy.tp
    stored = HALF if strategy.precision == "bf16" else 1  # inputs of 8-bit products are kept in 8 bits
    stream = n * model.hidden / layers.spread
    visits = model.top_k if model.experts > 1 else 1
    kept = 2 * HALF * stream + stored * stream * (1 + visits)  # of two norms, of attention, of experts
    kept += 2 * HALF * n * (model.queries + model.groups * model.width) / t
    kept += (HALF * (model.matrices - 1) + stored) * n * model.top_k * model.ffn / t
    kept += HALF * stream if model.dropout else 0.0
    if not layers.fused and strategy.recompute == "none":
        kept += 5 * strategy.microbatch * model.heads / t * model.seq * model.seq / strategy.cp
    return kept


def _stage(layers: Layers, stage: int) -> Memory:
    model, strategy, cluster = layers.model, layers.strategy, layers.cluster
    experts, dense = held(layers, stage)
    ranks = strategy.dp * strategy.cp

    def sharded(nbytes: float, from_stage: int) -> float:
        if strategy.zero < from_stage:
            return nbytes * (experts + dense)
        return nbytes * (experts / (ranks / strategy.ep) + dense / ranks)

    one = activations(layers)
    inputs = HALF * layers.tokens * model.hidden / layers.spread
    count = model.layers / strategy.pp
    flying = count * min(strategy.microbatches, strategy.pp - stage)
    if strategy.interleave > 1:
        flying = count * (strategy.pp - stage + (strategy.pp - 1) / strategy.interleave)
    kept = flying * inputs + one if strategy.recompute == "full" else flying * one
    if stage == strategy.pp - 1:
        kept += 6 * layers.tokens * model.vocab / strategy.tp
    weights = sharded(HALF + (1 if strategy.precision == "fp8" else 0), 3)
    if strategy.zero == 3:
        layer = model.attention_parameters + model.experts / strategy.ep * model.expert_parameters
        weights += 2 * HALF * layer / strategy.tp
    return Memory(weights, sharded(layers.gradient_bytes, 2), sharded(_ADAM, 1), kept, cluster.reserved)
