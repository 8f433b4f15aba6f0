"""Which module each node of a trace belongs to: its code in the forward pass, its gradient in the backward pass.

Used by `parallel.capture`. While a step is traced, module hooks note how many nodes there were when a module's forward
began and ended, and hooks on autograd nodes how many there were when each began to run; autograd numbers its nodes as
the forward pass makes them, which leads back to the module.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from collectives.errors import UsageError
from parallel.graph import Phase


@dataclass
class _Timeline:
    """A module path by position, from positions that only grow."""

    positions: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def add(self, position: int, path: str) -> None:
        self.positions.append(position)
        self.paths.append(path)

    def at(self, position: int) -> str:
        index = bisect_right(self.positions, position)
        return self.paths[index - 1] if index else ""


def _traced() -> int:
    """Number of nodes that the trace has now."""
    mode = get_proxy_mode()
    assert mode is not None
    return len(mode.tracer.graph.nodes)


class Watch:
    """Watches one trace; afterwards `place` tells phase and module of the node at a position."""

    def __init__(self) -> None:
        self._forward, self._autograd, self._backward = _Timeline(), _Timeline(), _Timeline()
        self._end = 0
        self._stack = [""]

    @contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        """Note where the forward of each module of `model` begins and ends."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack = [""]
        self._end = _traced()

    def _entering(self, path: str) -> Any:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._stack.append(path)
            self._mark()

        return enter

    def _leave(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        self._forward.add(_traced(), self._stack[-1])
        self._autograd.add(_get_sequence_nr(), self._stack[-1])

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Note where each autograd node behind `loss` begins to run. UsageError: one hides what is behind it."""
        handles = []
        seen: set[Any] = set()
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "CheckpointFunctionBackward":
                raise UsageError(
                    "activations are checkpointed with use_reentrant=True, which hides the parameters from the step; "
                    "use use_reentrant=False"
                )
            waiting.extend(before for before, _ in node.next_functions)
            if not node.name().endswith("AccumulateGrad"):
                handles.append(node.register_prehook(self._running(node._sequence_nr())))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _running(self, number: int) -> Any:
        path = self._autograd.at(number)

        def begin(_gradients: Any) -> None:
            self._backward.add(_traced(), path)

        return begin

    def place(self, position: int) -> tuple[Phase, str]:
        """Phase and module path of the node at a position of the trace."""
        if position < self._end:
            return Phase.FORWARD, self._forward.at(position)
        return Phase.BACKWARD, self._backward.at(position)
