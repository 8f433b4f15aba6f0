"""The arithmetic of one member's training: model, optimizer, schedule, gradient buckets and the state of all of them.

Driven by `launch.job` and, as the fault-free run, by `launch.reference`. A step has two halves. `clear` and
`accumulate` compute a share of the gradient and touch nothing but the buckets, so that a step which lost a member is
repeated by calling them again. `apply` moves the state, once everybody has the same buckets: it uses elementwise
operations and fixed-order sums only, so equal buckets and equal states give equal states, to the bit, on members with
the same number of threads (one, see `one_thread`) and the same torch and CPU features.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collectives import hashing
from collectives.errors import UsageError
from launch.config import JobConfig
from launch.data import Corpus, Plan
from launch.model import DTYPES, PRESETS, build
from launch.optimizer import AdamW, WarmupCosine

State: TypeAlias = dict[str, Any]
"""Nest of dicts of tensors and plain values; see `Trainer.state`."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside: more would split sums differently, and peers share the cores."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(former)


class Trainer:
    """One member's model and everything that training it moves. `step` counts the committed steps."""

    def __init__(self, config: JobConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.plan = Plan(corpus.windows, config.batch, config.seed)
        self.step = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = build(PRESETS[config.preset], config.context, DTYPES[config.dtype], self.generator)
        self.schedule = WarmupCosine(config.lr, config.lr / 10, config.warmup, config.decay_steps or config.steps)
        self.optimizer = AdamW(dict(self.model.named_parameters()), config.weight_decay)
        self.buckets = _bucket_gradients(list(self.model.parameters()), config.buckets)
        self._identity = _identity(config, corpus)

    @property
    def tokens(self) -> int:
        """Tokens of a whole step, by which the sum of the members' gradients is a mean."""
        return self.config.batch * self.config.context

    def share(self, rank: int, size: int) -> list[int]:
        """Return the samples of this step that `rank` of `size` members computes."""
        unit = self.config.microbatch if self.config.reproducible else 1
        return self.plan.share(self.step, rank, size, unit)

    def clear(self) -> None:
        """Zero the gradient buckets."""
        for bucket in self.buckets:
            bucket.zero_()

    def accumulate(self, samples: Sequence[int], tokens: int) -> float:
        """Add to the buckets the gradient of (sum of the samples' token losses) / `tokens`; return the sum alone.

        `samples` are ids of `Plan`. The sum is taken in fp64 whatever the model's dtype.
        """
        total = 0.0
        windows = [sample % self.corpus.windows for sample in samples]
        for first in range(0, len(windows), self.config.microbatch):
            losses = self._losses(*self.corpus.batch(windows[first : first + self.config.microbatch]))
            (losses.sum() / tokens).backward()  # type: ignore[no-untyped-call]
            total += float(losses.detach().double().sum())
        return total

    def apply(self) -> None:
        """Take the optimizer's step with the gradient that is in the buckets, clipped to its norm; count the step."""
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(bucket) for bucket in self.buckets]))
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for bucket in self.buckets:
            bucket.mul_(scale)
        self.optimizer.step(self.schedule.lr(self.step))
        self.step += 1

    @torch.no_grad()
    def evaluate(self, windows: Sequence[int]) -> float:
        """Return the sum of the token losses, in fp64, of windows of the held-out text."""
        total = 0.0
        for first in range(0, len(windows), self.config.microbatch):
            batch = self.corpus.validation_batch(windows[first : first + self.config.microbatch])
            total += float(self._losses(*batch).double().sum())
        return total

    def state(self) -> State:
        """Return the whole state: the live tensors, not copies, in fresh dicts with the plain values of now.

        `model`: parameter by name. `optimizer`: `state` (moments of each parameter by name) and `param_groups` (names
        and hyperparameters), as in checkpoints that `ringhold ckpt` converts. `schedule`. `rng`: the generator's state,
        uint8. `step`. `data`: epoch and offset in samples. `job`: what must be the same for the state to make sense
        (see `absorb`).
        """
        epoch, offset = self.plan.position(self.step)
        return {
            "model": {name: parameter.detach() for name, parameter in self.model.named_parameters()},
            "optimizer": {
                "state": {name: moments.tensors() for name, moments in self.optimizer.moments.items()},
                "param_groups": [group.values() for group in self.optimizer.groups.values()],
            },
            "schedule": self.schedule.values(),
            "rng": self.generator.get_state(),
            "step": self.step,
            "data": {"epoch": epoch, "offset": offset},
            "job": dict(self._identity),
        }

    def absorb(self, state: State) -> None:
        """Take over a state, one that `state` gave and a sync has filled in, or one that was read from a file.

        Raises:
            UsageError: it is no state of such a job, or that of another one: other settings or other text.

        """
        if lacking := [key for key in self.state() if key not in state]:
            raise UsageError(
                f"this is no state of a training job: it has no {', '.join(lacking)}; resume from one that is"
            )
        ours = [group.members for group in self.optimizer.groups.values()]
        if (theirs := [tuple(group["params"]) for group in state["optimizer"]["param_groups"]]) != ours:
            raise UsageError(f"the parameter groups of this state are {theirs}, not {ours}; resume from a job of ours")
        there = state["job"]
        differing = [key for key, value in self._identity.items() if there.get(key) != value]
        if differing:
            what = ", ".join(f"{key} ({self._identity[key]} here, {there.get(key)} there)" for key in differing)
            raise UsageError(f"this state belongs to another job: {what}; start with the same settings and text")
        for name, parameter in self.model.named_parameters():
            _fill(parameter.detach(), state["model"][name])
            for key, tensor in self.optimizer.moments[name].tensors().items():
                _fill(tensor, state["optimizer"]["state"][name][key])
        for group, values in zip(self.optimizer.groups.values(), state["optimizer"]["param_groups"], strict=True):
            group.absorb(values)
        self.schedule = WarmupCosine(**state["schedule"])
        self.generator.set_state(state["rng"])
        self.step = state["step"]

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every token, flat."""
        logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def _bucket_gradients(parameters: Sequence[nn.Parameter], most: int) -> list[Tensor]:
    """Make at most `most` flat buckets of about equal size, and each parameter's gradient a view of its place in one.

    Backward adds into these views, an all-reduce works on the buckets in place, the optimizer reads the views.
    """
    total = sum(parameter.numel() for parameter in parameters)
    shares: list[list[nn.Parameter]] = [[] for _ in range(most)]
    seen = 0
    for parameter in parameters:
        shares[seen * most // total].append(parameter)
        seen += parameter.numel()
    buckets = []
    for share in filter(None, shares):
        bucket = torch.zeros(sum(parameter.numel() for parameter in share), dtype=share[0].dtype)
        pieces = torch.split(bucket, [parameter.numel() for parameter in share])
        for parameter, piece in zip(share, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        buckets.append(bucket)
    return buckets


def _identity(config: JobConfig, corpus: Corpus) -> dict[str, str | int]:
    """What has to be equal for two states to belong to the same job."""
    return {
        **({"microbatch": config.microbatch} if config.reproducible else {}),
        "preset": config.preset,
        "context": config.context,
        "batch": config.batch,
        "dtype": config.dtype,
        "seed": config.seed,
        "text": hashing.digest(corpus.train.numpy()).hex()[:16],
        "windows": corpus.windows,
    }


def _fill(own: Tensor, given: Tensor) -> None:
    """Overwrite in place, unless a sync has done so already."""
    if given.data_ptr() != own.data_ptr():
        own.copy_(given)
