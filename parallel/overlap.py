"""TokenWeave: a tensor-parallel transformer whose tokens are split in two, so that one half computes while the other's
all-reduce is under way (Gond, Kwatra and Ramjee, 2025, arXiv:2505.11329).

The all-reduce is taken apart (`collectives.algorithms.weave`): reduce-scatter, residual addition and RMSNorm on a
rank's rows, all-gather. The residual stays sharded by rows from the first block to the last. The exchanges of both
halves go one after the other in a lane of their own, in the background, in the backward pass too, where the halves take
turns in reverse. In two lanes they would be slower where the links are busy all the time: the confirmation of one half,
without which it cannot go on, would queue behind the bulk of the other.

    stack = WovenStack(shape, comm)
    out = stack(x)                       # x and out: (B, T, width), the same on all members
    out.sum().backward()
    stack.sum_partial_gradients()        # of the norms, which all members have

Where to split, and whether it pays: `parallel.split_choice`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from collectives.algorithms.weave import KERNEL, weave
from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.outcome import Work
from collectives.region import split
from collectives.subgroup import SubGroup

Members = Communicator | SubGroup
EPS = 1e-6
LANE = "weave"


@dataclass(frozen=True, slots=True)
class WovenShape:
    """Sizes: `width` features, `heads` that divide it, `hidden` features of the perceptron, number of blocks."""

    width: int
    heads: int
    hidden: int
    layers: int


class _Exchange:
    """One weave of one half: what its two ends share, forward and backward.

    The graph has a node where it starts and one where it is awaited. Backward, the latter starts the exchange of the
    gradients and the former awaits it; what lies between them in the graph is computed meanwhile.
    """

    def __init__(self, comm: Members, weight: Tensor) -> None:
        self._comm, self.weight = comm, weight
        self._work: Work | None = None
        self.grad_weight: Tensor | None = None

    def start(self, partial: Tensor, own: Tensor, between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Sum `partial` (rows, width) over the members; `between(summed, own)` makes all rows and own ones of it."""
        rows, width = partial.shape
        schedule = weave(self._comm.size, rows, width)

        def kernel(gathered: Tensor, kept: Tensor, summed: Tensor, before: Tensor) -> None:
            with torch.no_grad():
                everyones, mine = between(summed.view(-1, width), before.view(-1, width))
                gathered.copy_(everyones.reshape(-1))
                kept.copy_(mine.reshape(-1))

        source = torch.cat([partial.detach().reshape(-1), own.detach().reshape(-1)])
        self._work = self._comm.redistribute(schedule, source, kernels={KERNEL: kernel}, async_op=True, lane=LANE)

    def finish(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Await it: what all got (rows, width), and this member's own rows; both in the memory of the result."""
        work, self._work = self._work, None
        assert work is not None
        line = work.wait().result
        assert line is not None
        return line[: rows * width].view(rows, width), line[rows * width :].view(-1, width)


class _Start(torch.autograd.Function):
    """Forward: start the sum. Backward: await the gradients."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, own: Tensor, weight: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, partial.shape

        def between(summed: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            residual = before + summed
            return _normed(residual, weight), residual

        exchange.start(partial, own, between)
        return partial.new_zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: Tensor) -> tuple[Tensor | None, ...]:
        grad_partial, grad_own = ctx.exchange.finish(*ctx.shape)
        return grad_partial, grad_own, ctx.exchange.grad_weight, None


class _Finish(torch.autograd.Function):
    """Forward: await the sum. Backward: start the exchange of the gradients."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: _Exchange, rows: int, width: int) -> tuple[Tensor, Tensor]:
        normed, residual = exchange.finish(rows, width)
        ctx.exchange = exchange
        ctx.save_for_backward(residual)
        return normed, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        (residual,), exchange = ctx.saved_tensors, ctx.exchange

        def between(summed: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            grad, grad_weight = _norm_gradients(residual, exchange.weight, summed)
            exchange.grad_weight = grad_weight
            total = own + grad
            return total, total

        exchange.grad_weight = torch.zeros_like(exchange.weight)
        exchange.start(grad_normed.contiguous(), grad_residual.contiguous(), between)
        return grad_normed.new_zeros(1), None, None, None


class _Enter(torch.autograd.Function):
    """Forward: as it is. Backward: the sum of what the members find, each for its share of the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Members) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.all_reduce(grad.contiguous()).result, None


class _Leave(torch.autograd.Function):
    """Forward: as it is. Backward: a share of the gradient, which all members have whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Members) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad / ctx.comm.size, None


class WovenBlock(nn.Module):
    """This member's part of a block: some heads of the attention, some features of the perceptron; and two norms."""

    def __init__(self, shape: WovenShape, rank: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._head = shape.width // shape.heads
        start, stop = split(shape.heads, size)[rank]
        first, last = split(shape.hidden, size)[rank]
        inner = (stop - start) * self._head
        self.attention_norm = nn.Parameter(torch.ones(shape.width, dtype=dtype))
        self.mlp_norm = nn.Parameter(torch.ones(shape.width, dtype=dtype))
        self.query_key_value = nn.Parameter(torch.empty(3 * inner, shape.width, dtype=dtype))
        self.attention_out = nn.Parameter(torch.empty(shape.width, inner, dtype=dtype))
        self.mlp_in = nn.Parameter(torch.empty(last - first, shape.width, dtype=dtype))
        self.mlp_out = nn.Parameter(torch.empty(shape.width, last - first, dtype=dtype))

    def attend(self, normed: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, width) -> this member's share of the attention's output, and the keys and values so far.

        `before`: keys and values of the tokens that come before these.
        """
        batch, length, _ = normed.shape
        made = F.linear(normed, self.query_key_value).view(batch, length, 3, -1, self._head)
        q, k, v = made.permute(2, 0, 3, 1, 4)
        seen = 0
        if before is not None:
            seen = before[0].shape[2]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        mask = None
        if seen:
            mask = torch.ones(length, seen + length, dtype=torch.bool).tril(seen)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.attention_out), (k, v)

    def perceive(self, normed: Tensor) -> Tensor:
        """(B, T, width) -> this member's share of the perceptron's output."""
        return F.linear(F.gelu(F.linear(normed, self.mlp_in)), self.mlp_out)


class WovenStack(nn.Module):
    """A stack of blocks with a last norm. All members build it alike, with the same seed.

    Args:
        shape: sizes of the whole; heads and hidden features are shared out, as evenly as can be.
        comm: the members.
        dtype: fp32 or fp64.
        seed: of the whole weights, of which each member keeps its part.

    Raises:
        UsageError: the heads do not divide the width, or there are fewer than members; another dtype.

    """

    def __init__(self, shape: WovenShape, comm: Members, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        if shape.width % shape.heads or shape.heads < comm.size:
            raise UsageError(f"{shape.heads} heads must divide the width {shape.width} and be {comm.size} or more")
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"a woven stack sums in fp32 or fp64, not {dtype}")
        self._shape, self._comm = shape, comm
        self.blocks = nn.ModuleList(WovenBlock(shape, comm.rank, comm.size, dtype) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width, dtype=dtype))
        chance = torch.Generator().manual_seed(seed)
        for block in self._blocks():
            _fill(block, shape, comm.rank, comm.size, chance)

    def forward(self, x: Tensor, split_at: int | None = None) -> Tensor:
        """Return the stack's normed output (B, T, width) for x (B, T, width), both the same on all members.

        Args:
            x: what the first block gets.
            split_at: tokens of the first half, from 0 (no second half) to T; None: half of them.

        Raises:
            UsageError: there are fewer tokens than that.
            MemberLost: a member died meanwhile.

        """
        batch, length, width = x.shape
        point = length // 2 if split_at is None else split_at
        if not 0 <= point <= length:
            raise UsageError(f"a split after {point} tokens of {length}; give 0 to {length}")
        x = _Enter.apply(x, self._comm)  # type: ignore[no-untyped-call]
        parts = [part for part in torch.split(x, [point, length - point], 1) if part.shape[1]]
        halves = [_Half(self._comm, part) for part in parts]
        blocks = list(self._blocks())
        for half in halves:
            half.normed = _normed(half.begin(), blocks[0].attention_norm).view(batch, -1, width)
        for number, block in enumerate(blocks):
            after = blocks[number + 1].attention_norm if number + 1 < len(blocks) else self.norm
            before = None
            for half in halves:
                half.finish()
                partial, before = block.attend(half.normed, before)
                half.start(partial, block.mlp_norm)
            for half in halves:
                half.finish()
                half.start(block.perceive(half.normed), after)
        for half in halves:
            half.finish()
        out: Tensor = _Leave.apply(torch.cat([half.normed for half in halves], 1), self._comm)  # type: ignore[no-untyped-call]
        return out

    def sum_partial_gradients(self) -> None:
        """After the backward pass: add up the gradients of the norms, of which each member has the part of its rows."""
        self._comm.all_reduce_coalesced([weight.grad for weight in self.norms() if weight.grad is not None])

    def norms(self) -> Iterable[nn.Parameter]:
        """The weights that all members have, in order."""
        for number, block in enumerate(self._blocks()):
            if number:
                yield block.attention_norm
            yield block.mlp_norm
        yield self.norm
        yield next(iter(self._blocks())).attention_norm

    def _blocks(self) -> Iterable[WovenBlock]:
        return (cast(WovenBlock, block) for block in self.blocks)


class _Half:
    """Some of the tokens on their way through the stack; `normed` (B, t, width) is what the next layer gets."""

    def __init__(self, comm: Members, x: Tensor) -> None:
        self._comm = comm
        self._shape = x.shape
        self._x = x.reshape(-1, x.shape[2])
        start, stop = split(self._x.shape[0], comm.size)[comm.rank]
        self._residual = self._x[start:stop]
        self._under_way: tuple[_Exchange, Tensor] | None = None
        self.normed = x

    def begin(self) -> Tensor:
        """What it begins with, (rows, width)."""
        return self._x

    def start(self, partial: Tensor, weight: Tensor) -> None:
        """Start to add up what the members found, to add it to the residual, and to norm that."""
        exchange = _Exchange(self._comm, weight)
        rows = partial.reshape(self._x.shape)
        token: Tensor = _Start.apply(rows, self._residual, weight, exchange)  # type: ignore[no-untyped-call]
        self._under_way = exchange, token

    def finish(self) -> None:
        """Await it, if it was started."""
        if self._under_way is not None:
            (exchange, token), self._under_way = self._under_way, None
            normed, self._residual = _Finish.apply(token, exchange, *self._x.shape)  # type: ignore[no-untyped-call]
            self.normed = normed.view(self._shape)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of rows (Zhang and Sennrich, 2019, arXiv:1910.07467)."""
    normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    return normed


def _norm_gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_normed` by x, and by the weight."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    unit, passed = x * scale, grad * weight
    return scale * (passed - unit * (passed * unit).mean(-1, keepdim=True)), (grad * unit).sum(0)


@torch.no_grad()
def _fill(block: WovenBlock, shape: WovenShape, rank: int, size: int, chance: torch.Generator) -> None:
    """Give a block its part of weights that do not depend on the number of members."""
    dtype, width = block.attention_out.dtype, shape.width
    heads, hidden = split(shape.heads, size)[rank], split(shape.hidden, size)[rank]
    rows = slice(heads[0] * (width // shape.heads), heads[1] * (width // shape.heads))

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=chance, dtype=torch.float64).mul(width**-0.5).to(dtype)

    block.query_key_value.copy_(drawn(3, width, width)[:, rows].reshape(-1, width))
    block.attention_out.copy_(drawn(width, width)[:, rows])
    block.mlp_in.copy_(drawn(shape.hidden, width)[slice(*hidden)])
    block.mlp_out.copy_(drawn(width, shape.hidden)[:, slice(*hidden)])
