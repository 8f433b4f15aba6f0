"""What the members of a group do in the tests of overlap."""

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.region import split
from parallel.overlap import WovenShape, WovenStack

SHAPE = WovenShape(12, 6, 20, 3)


def passed(stack: WovenStack, split_at: int) -> list[Tensor]:
    """Output and gradients: of the input, and of all weights."""
    chance = torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, SHAPE.width, generator=chance, dtype=torch.float64).requires_grad_()
    grad = torch.randn(x.shape, generator=chance, dtype=torch.float64)
    stack.zero_grad()
    out = stack(x, split_at)
    out.backward(grad)
    stack.sum_partial_gradients()
    assert x.grad is not None
    return [out.detach(), x.grad, *(weight.grad for weight in stack.parameters() if weight.grad is not None)]


def largest_errors(comm: Communicator, points: list[int]) -> list[float]:
    """Against one process that does not split, for each split point."""
    alone, ours = (WovenStack(SHAPE, members, torch.float64) for members in (Communicator.solo(), comm))
    whole = passed(alone, 9)
    parts = [whole[0], whole[1], *(part(name, whole[2 + n], comm) for n, name in enumerate(names(alone)))]
    found = []
    for point in points:
        got = passed(ours, point)
        assert len(got) == len(parts)
        found.append(max(float((a - b).abs().max()) for a, b in zip(got, parts, strict=True)))
    return found


def names(stack: WovenStack) -> list[str]:
    return [name for name, weight in stack.named_parameters() if weight.grad is not None]


def part(name: str, whole: Tensor, comm: Communicator) -> Tensor:
    """This member's part of a gradient."""
    heads, hidden = (slice(*split(count, comm.size)[comm.rank]) for count in (SHAPE.heads, SHAPE.hidden))
    head = SHAPE.width // SHAPE.heads
    rows = slice(heads.start * head, heads.stop * head)
    match name.rpartition(".")[2]:
        case "query_key_value":
            return whole.view(3, SHAPE.width, SHAPE.width)[:, rows].reshape(-1, SHAPE.width)
        case "attention_out":
            return whole[:, rows]
        case "mlp_in":
            return whole[hidden]
        case "mlp_out":
            return whole[:, hidden]
    return whole
