"""What a rank of `benchmarks.weaving` does: passes through a woven stack with its tokens split and not, in turns."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from parallel.overlap import WovenBlock, WovenShape, WovenStack
from parallel.split_choice import Load


class SleepingBlock(WovenBlock):
    """A block that sleeps as long as its load says in place of computing; all that is around it is real."""

    def __init__(self, shape: WovenShape, rank: int, size: int, load: Load) -> None:
        super().__init__(shape, rank, size, torch.float32)
        self._load = load

    def attend(self, normed: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        time.sleep(self._load.seconds(normed.shape[1]))
        return normed, (normed, normed)

    def perceive(self, normed: Tensor) -> Tensor:
        time.sleep(self._load.seconds(normed.shape[1]))
        return normed


def modelled(comm: Any, width: int, cases: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Seconds of each pass of each case (layers, tokens, split, fixed, each, passes), split and whole."""
    found = []
    for case in cases:
        shape = WovenShape(width, comm.size, comm.size, case["layers"])
        stack = WovenStack(shape, comm)
        load = Load(case["fixed"], case["each"])
        stack.blocks = nn.ModuleList(SleepingBlock(shape, comm.rank, comm.size, load) for _ in range(shape.layers))
        found.append(_in_turns(comm, stack, case["tokens"], case["split"], width, rounds * case["passes"]))
    return {"rank": comm.rank, "cases": found}


def computed(comm: Any, tokens: int, width: int, layers: int, rounds: int) -> dict[str, Any]:
    """Seconds of each pass of a stack that computes."""
    stack = WovenStack(WovenShape(width, 8, 4 * width, layers), comm)
    return {"rank": comm.rank, "cases": [_in_turns(comm, stack, tokens, tokens // 2, width, rounds)]}


@torch.no_grad()
def _in_turns(comm: Any, stack: WovenStack, tokens: int, split: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Forward passes, split and whole, from when all begin; after one of each that is not counted."""
    x = torch.randn(1, tokens, width)
    times: dict[str, list[float]] = {"split": [], "whole": []}
    for number in range(1 + rounds):
        for name, point in (("split", split), ("whole", tokens)):
            comm.barrier()
            begun = time.perf_counter()
            stack(x, point)
            if number:
                times[name].append(time.perf_counter() - begun)
    return times
