"""AdamW and its learning rate schedule, with all that they remember in plain view.

Used by `launch.trainer`. The update is that of `torch.optim.AdamW`, to the bit; that class would bring in torch's
compiler (0.9 s for every peer that starts) and makes its moments only in the first step, when a joiner needs a place
for them before. Only elementwise operations: equal gradients and states give equal states.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Group:
    """Hyperparameters of the parameters named in `members`."""

    members: tuple[str, ...]
    weight_decay: float
    lr: float = 0.0
    """Set before every step."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def values(self) -> dict[str, Any]:
        """Return the group under the names of torch's optimizers."""
        return {
            "params": list(self.members),
            "lr": self.lr,
            "betas": [self.beta1, self.beta2],
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def absorb(self, values: Mapping[str, Any]) -> None:
        """Take over what `values` returned."""
        self.lr, self.eps, self.weight_decay = values["lr"], values["eps"], values["weight_decay"]
        self.beta1, self.beta2 = values["betas"]


@dataclass(slots=True)
class Moments:
    """What AdamW remembers of one parameter: steps taken (scalar, int64) and the two running averages, of its shape."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; not copies."""
        return {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019): matrices decay, norms do not."""

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float) -> None:
        self.parameters = dict(parameters)
        self.moments = {
            name: Moments(torch.zeros((), dtype=torch.int64), torch.zeros_like(p), torch.zeros_like(p))
            for name, p in self.parameters.items()
        }
        self.groups = {
            "decay": Group(tuple(name for name, p in parameters.items() if p.dim() > 1), weight_decay),
            "no_decay": Group(tuple(name for name, p in parameters.items() if p.dim() <= 1), 0.0),
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter by its gradient."""
        for group in self.groups.values():
            group.lr = lr
            for name in group.members:
                gradient = self.parameters[name].grad
                assert gradient is not None, name
                _update(self.parameters[name], gradient, self.moments[name], group)


def _update(parameter: Tensor, gradient: Tensor, moments: Moments, group: Group) -> None:
    moments.step += 1
    step = int(moments.step)
    parameter.mul_(1 - group.lr * group.weight_decay)
    moments.exp_avg.lerp_(gradient, 1 - group.beta1)
    moments.exp_avg_sq.mul_(group.beta2).addcmul_(gradient, gradient, value=1 - group.beta2)
    scale = (moments.exp_avg_sq.sqrt() / (1 - group.beta2**step) ** 0.5).add_(group.eps)
    parameter.addcdiv_(moments.exp_avg, scale, value=-(group.lr / (1 - group.beta1**step)))


@dataclass(slots=True)
class WarmupCosine:
    """Learning rate of a step: linear to `peak` over `warmup` steps, then a cosine to `floor` at step `decay_steps`."""

    peak: float
    floor: float
    warmup: int
    decay_steps: int

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if step >= self.decay_steps:
            return self.floor
        done = (step - self.warmup) / (self.decay_steps - self.warmup)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * done)) / 2

    def values(self) -> dict[str, Any]:
        """Return the schedule by name, as `WarmupCosine(**values)` takes it."""
        return asdict(self)
