"""What one layer takes on one device for one microbatch: its matrix products, attention, memory traffic, communication.

`stage.py` adds layers up. Volumes of tensor and sequence parallelism are those of arXiv 2205.05198; of context
parallelism those of a ring of keys and values; of experts two all-to-alls a pass (arXiv 2006.16668).
"""

from dataclasses import dataclass

from parallel.scale.cluster import Cluster, Group
from parallel.scale.kernels import Kernels
from parallel.scale.seconds import Seconds
from parallel.scale.strategy import Strategy
from parallel.scale.transformer import Transformer

HALF = 2
"""Bytes of a 16-bit element."""
_ROUTING = 16
"""Small kernels that choose experts, count, and let the host learn the counts before the exchange."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Seconds of a forward pass, of a backward pass, and of what the backward pass computes again."""

    forward: Seconds
    backward: Seconds
    again: Seconds

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def __mul__(self, times: float) -> "Passes":
        return Passes(self.forward * times, self.backward * times, self.again * times)


@dataclass(frozen=True, slots=True)
class Layers:
    """Costs of the layers of a model, divided by a strategy, on a cluster."""

    model: Transformer
    strategy: Strategy
    cluster: Cluster
    saved: tuple[float, float] = (0.0, 0.0)
    """Seconds of a layer's forward and backward pass that a better plan of its inside saves (`parallel.stages`)."""

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one context-parallel rank."""
        return self.strategy.microbatch * self.model.seq / self.strategy.cp

    @property
    def spread(self) -> int:
        """Among how many ranks norms and residuals are split."""
        return self.strategy.tp if self.strategy.sequence_parallel else 1

    @property
    def fused(self) -> bool:
        """Whether attention scores stay out of memory."""
        wanted = self.strategy.attention
        return self.cluster.flash if wanted == "auto" else wanted == "flash"

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient in memory and on the wire."""
        return self.strategy.gradient_bytes or self.cluster.gradient_bytes

    @property
    def kernels(self) -> Kernels:
        """Kernels in the strategy's precision."""
        return Kernels(self.cluster, self.strategy.precision)

    def layer(self) -> Passes:
        """One layer of the stack."""
        forward, backward = self.attention()
        parts = [self._products(), self._elementwise(), Passes(forward, backward, Seconds()), self._communication()]
        total = parts[0] + parts[1] + parts[2] + parts[3]
        shares = [1.0 - saved / p.total for saved, p in zip(self.saved, (total.forward, total.backward), strict=True)]
        total = Passes(total.forward * shares[0], total.backward * shares[1], total.again)
        if self.strategy.recompute == "full":
            return Passes(total.forward, total.backward, total.forward)
        inside = forward if self.strategy.recompute == "selective" and not self.fused else Seconds()
        return Passes(total.forward, total.backward, inside)

    def embedding(self) -> Passes:
        """Looking up tokens: a vocabulary-parallel table, its partial sums reduced."""
        once = self.kernels.memory(3 * HALF * self.tokens * self.model.hidden / self.spread)
        moved = self._tensor_group().reduce(HALF * self.tokens * self.model.hidden)
        seconds = Seconds(vocabulary=once + moved)
        return Passes(seconds, seconds, Seconds())

    def head(self) -> Passes:
        """Output layer and cross entropy in 32 bits, split by vocabulary."""
        t, kernels = self.strategy.tp, Kernels(self.cluster)
        product = kernels.product(self.tokens, self.model.vocab / t, self.model.hidden)
        logits = self.tokens * self.model.vocab / t
        gather = self._tensor_group().gather(HALF * self.tokens * self.model.hidden)
        forward = Seconds(vocabulary=product + kernels.memory(14 * logits) + gather)
        backward = Seconds(vocabulary=2 * product + kernels.memory(8 * logits) + gather)
        return Passes(forward, backward, Seconds())

    def _products(self) -> Passes:
        model, t, n = self.model, self.strategy.tp, self.tokens
        columns = model.queries / t + 2 * max(model.groups / t, 1.0) * model.width  # a rank has whole heads
        local = model.experts / self.strategy.ep
        rows = n * model.top_k / local
        shapes = (
            (n, columns, model.hidden, 1.0),
            (n, model.hidden, model.queries / t, 1.0),
            (rows, model.ffn / t * (model.matrices - 1), model.hidden, local),
            (rows, model.hidden, model.ffn / t, local),
        )
        product = self.kernels.product
        forward = sum(product(m, c, k, count) for m, c, k, count in shapes)
        inputs = sum(product(m, k, c, count) for m, c, k, count in shapes)
        weights = sum(product(k, c, m, count) for m, c, k, count in shapes)
        return Passes(Seconds(products=forward), Seconds(products=inputs + weights), Seconds())

    def _elementwise(self) -> Passes:
        model, t = self.model, self.strategy.tp
        stream = HALF * self.tokens * model.hidden / self.spread
        masks = stream if model.dropout else 0.0
        wide = HALF * self.tokens * model.top_k * model.ffn / t
        heads = 0.0 if not model.gated else HALF * self.tokens * (model.queries + model.groups * model.width) / t
        memory = self.kernels.memory
        # Two norms (read, write), two residuals (read two, write one); the activation; rotary embedding.
        forward = 2 * memory(2 * stream) + 2 * memory(3 * stream + masks / 2)
        forward += memory((3 if model.gated else 2) * wide) + memory(2 * heads)
        backward = 2 * memory(4 * stream) + 2 * memory(2 * stream + masks / 2)
        backward += memory((5 if model.gated else 3) * wide) + memory(2 * heads)
        return Passes(Seconds(elementwise=forward), Seconds(elementwise=backward), Seconds())

    def attention(self) -> tuple[Seconds, Seconds]:
        """The inside of attention, forward and backward, with what of its ring does not hide."""
        model, t = self.model, self.strategy.tp
        flops = 4.0 * self.tokens * model.seq * model.queries / t
        if self.fused:
            forward = self.kernels.attention(flops, model.seq)
            backward = self.kernels.attention(2.5 * flops, model.seq, backward=True)
        else:
            kernels = Kernels(self.cluster)
            count, rows = self.strategy.microbatch * model.heads / t, model.seq / self.strategy.cp
            pair = kernels.product(rows, model.seq, model.width, count)
            pair += kernels.product(rows, model.width, model.seq, count)
            scores = count * rows * model.seq
            forward = pair + kernels.memory((9 if model.dropout else 4) * scores)
            backward = 2 * pair + kernels.memory((11 if model.dropout else 6) * scores)
        return (
            Seconds(attention=forward, context=self._ring(forward, 1)),
            Seconds(attention=backward, context=self._ring(backward, 2)),
        )

    def _ring(self, hidden_behind: float, times: int) -> float:
        """Keys and values (and their gradients) passed around, as far as attention does not hide it."""
        cp = self.strategy.cp
        block = times * HALF * self.tokens * 2 * self.model.groups * self.model.width / self.strategy.tp
        hop = self.cluster.group(cp, self.strategy.tp).send(block)
        return max((cp - 1) * hop - hidden_behind * (cp - 1) / cp, 0.1 * (cp - 1) * hop)

    def _communication(self) -> Passes:
        model, strategy, kernels = self.model, self.strategy, self.kernels
        stream = HALF * self.tokens * model.hidden
        once = self._tensor_group().reduce(stream)
        exposed = 1.0 - self.cluster.tp_overlap
        if model.experts == 1:
            seconds = Seconds(tensor=2 * exposed * once)
            return Passes(seconds, seconds, Seconds())
        # Tokens go to their experts before tensor-parallel ranks exchange them: once for each visit, and nothing hides.
        visits = stream * model.top_k
        stride = strategy.tp * (strategy.cp if strategy.expert_ranks == "far" else 1)
        exchange = self.cluster.group(strategy.ep, stride).exchange(visits / self.spread)
        # Sorted by rank and, there, by expert, and back: all of them read and written.
        sorting = 2 * kernels.memory(2 * visits / self.spread) + 2 * kernels.memory(2 * visits)
        seconds = Seconds(
            tensor=exposed * once + self._tensor_group().reduce(visits),
            expert=2 * exchange + sorting + _ROUTING * self.cluster.kernel,
        )
        return Passes(seconds, seconds, Seconds())

    def _tensor_group(self) -> Group:
        return self.cluster.group(self.strategy.tp, 1)
