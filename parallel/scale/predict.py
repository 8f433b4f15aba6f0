"""The time of a training step at scale, from the costs of its layers, its pipeline and its data parallelism."""

from dataclasses import dataclass
from typing import Any

from parallel.scale.cluster import Cluster
from parallel.scale.layer import HALF, Layers, Passes
from parallel.scale.memory import Memory, held, peak
from parallel.scale.pipeline import makespan, split_layers
from parallel.scale.seconds import Seconds
from parallel.scale.strategy import Strategy
from parallel.scale.transformer import Transformer

_STEP_BYTES = 34
"""Bytes a parameter that Adam reads and writes: 32-bit weights and two moments both ways, gradient, 16-bit weights."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step takes.

    Attributes:
        time: seconds of a step.
        seconds: of each cause, on the stage that is busiest; they add up to `time`.
        memory: bytes of a device at its peak.
        model_flops: FLOP/s of a device that the model needs by itself.
        hardware_flops: FLOP/s of a device, what is computed again included (arXiv 2104.04473 counts so).
        tokens: tokens a second of a device.
        utilization: `model_flops` as a share of the device's 16-bit peak (MFU).

    """

    time: float
    seconds: Seconds
    memory: Memory
    model_flops: float
    hardware_flops: float
    tokens: float
    utilization: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values: seconds, bytes, TFLOP/s."""
        memory = {name: getattr(self.memory, name) for name in Memory.__slots__}
        return {
            "time": self.time,
            "seconds": self.seconds.by_cause(),
            "memory": memory | {"total": self.memory.total},
            "model_tflops_per_device": self.model_flops / 1e12,
            "hardware_tflops_per_device": self.hardware_flops / 1e12,
            "tokens_per_second_per_device": self.tokens,
            "model_flops_utilization": self.utilization,
        }


def predict(
    model: Transformer,
    strategy: Strategy,
    cluster: Cluster,
    follow: bool = True,
    saved: tuple[float, float] = (0.0, 0.0),
) -> Prediction:
    """Predict the time and the memory of a training step.

    Args:
        model, strategy, cluster: what is trained, how it is divided, and where.
        follow: whether to follow every microbatch through the pipeline; otherwise its filling and draining are taken
            from the formula of arXiv 2104.04473, section 2.2, which is quicker and good enough to drop what is slow.
        saved: seconds of a layer's forward and backward pass that a better plan of its inside saves.

    Raises:
        UsageError: the model cannot be divided so.

    """
    strategy.check(model)
    layers = Layers(model, strategy, cluster, saved)
    stages = _stages(layers)
    hop = _hop(layers)
    busy = [sum((chunk.forward.total + chunk.backward.total + chunk.again.total for chunk in s), 0.0) for s in stages]
    busiest = max(range(strategy.pp), key=busy.__getitem__)
    if follow:
        through = makespan(
            [[chunk.forward.total for chunk in stage] for stage in stages],
            [[chunk.backward.total + chunk.again.total for chunk in stage] for stage in stages],
            strategy.microbatches,
            hop,
        )
    else:
        rounds = strategy.microbatches + (strategy.pp - 1) / strategy.interleave
        through = rounds * (busy[busiest] + 2 * strategy.interleave * hop)
    own = Seconds()
    for chunk in stages[busiest]:
        own = own + (chunk.forward + chunk.backward + chunk.again) * strategy.microbatches
    sent = min(2 * strategy.interleave * strategy.microbatches * hop, max(through - own.total, 0.0))
    own = own + Seconds(stages=sent, bubble=max(through - own.total - sent, 0.0))
    own = own + Seconds(data=_data(layers, busiest, stages[busiest]), optimizer=_optimizer(layers, busiest))
    return _prediction(layers, own)


def _prediction(layers: Layers, seconds: Seconds) -> Prediction:
    model, strategy, cluster = layers.model, layers.strategy, layers.cluster
    again = 0.0
    if strategy.recompute == "full":
        again = model.layers * model.layer_flops
    elif strategy.recompute == "selective":
        again = model.layers * 4.0 * model.seq**2 * model.queries
    rate = strategy.batch / (seconds.total * strategy.devices)
    return Prediction(
        time=seconds.total,
        seconds=seconds,
        memory=peak(layers),
        model_flops=rate * model.flops,
        hardware_flops=rate * (model.flops + again),
        tokens=rate * model.seq,
        utilization=rate * model.flops / cluster.flops,
    )


def _stages(layers: Layers) -> list[list[Passes]]:
    """Costs of each stage's chunks for one microbatch."""
    strategy = layers.strategy
    parts = strategy.pp * strategy.interleave
    one = layers.layer()
    costs = [one * count for count in split_layers(layers.model.layers, parts)]
    costs[0] = costs[0] + layers.embedding()
    costs[-1] = costs[-1] + layers.head()
    return [costs[stage :: strategy.pp] for stage in range(strategy.pp)]


def _hop(layers: Layers) -> float:
    """Seconds of an activation's way to the next stage that do not hide; each tensor-parallel rank sends its share."""
    strategy = layers.strategy
    if strategy.pp == 1:
        return 0.0
    group = layers.cluster.group(strategy.pp, strategy.tp * strategy.cp * strategy.dp)
    exposed = 1.0 - layers.cluster.pp_overlap
    return exposed * group.send(HALF * layers.tokens * layers.model.hidden / strategy.tp)


def _data(layers: Layers, stage: int, chunks: list[Passes]) -> float:
    """Gradients reduced and, where the optimizer is sharded, parameters gathered: what does not hide.

    Gradients can hide behind the backward pass of the last microbatch, parameters behind the forward pass of the
    first. ZeRO-3 gathers parameters for every pass of every microbatch, behind the layer before.
    """
    strategy, cluster = layers.strategy, layers.cluster
    experts, dense = held(layers, stage)
    inner = strategy.tp
    every = cluster.group(strategy.dp * strategy.cp, inner)
    apart = cluster.group(max(1, strategy.dp * strategy.cp // strategy.ep), inner * strategy.ep)
    reduced = every.gather(layers.gradient_bytes * dense) + apart.gather(layers.gradient_bytes * experts)
    wide = HALF if strategy.zero else layers.gradient_bytes
    gathered = every.gather(wide * dense) + apart.gather(wide * experts)
    forward = sum(chunk.forward.total for chunk in chunks)
    backward = sum(chunk.backward.total + chunk.again.total for chunk in chunks)
    hide = cluster.dp_overlap
    if strategy.zero < 3:
        if not strategy.zero:  # an all-reduce: both halves are of gradients
            return _exposed(reduced + gathered, hide * backward)
        return _exposed(reduced, hide * backward) + _exposed(gathered, hide * forward)
    passes = strategy.microbatches
    return passes * (_exposed(gathered, hide * forward) + _exposed(gathered + reduced, hide * backward))


def _exposed(communication: float, hidden_behind: float) -> float:
    """The first and the last piece never hide: a twentieth."""
    return max(communication - hidden_behind, 0.05 * communication)


def _optimizer(layers: Layers, stage: int) -> float:
    strategy = layers.strategy
    experts, dense = held(layers, stage)
    ranks = strategy.dp * strategy.cp if strategy.zero else 1
    share = dense / ranks + experts / max(1, ranks // strategy.ep if strategy.zero else 1)
    return layers.kernels.memory(_STEP_BYTES * share)
