"""The gradient of a step, summed over the members: as it comes, or with bits that do not depend on who computed what.

Called by `launch.job` for every attempt of a step, and by `launch.reference` with a communicator of one member, so that
both do the very same. As it comes, a member adds up its samples and the members' sums are reduced: which samples met
first shows in the last bits. With `reproducible` the batch is cut into fixed microbatches; the gradient of each is
computed whole by somebody and contributed singly, and `collectives.reproducible` makes the sum a function of the
microbatches alone. That takes memory for one gradient a microbatch of the share, and more bytes (docs/numerics.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.outcome import Outcome
from launch.trainer import Trainer


def reduce(trainer: Trainer, comm: Communicator, samples: Sequence[int]) -> Outcome:
    """Leave in the trainer's buckets the gradient of the step, given this member's share of its samples.

    Returns:
        The outcome of the first reduction: (sum of the losses, number of tokens) over all members, fp64.

    """
    if trainer.config.reproducible:
        return _singly(trainer, comm, samples)
    trainer.clear()
    outcome = comm.all_reduce(_account(trainer, samples))
    for bucket in trainer.buckets:
        comm.all_reduce(bucket)
    return outcome


def _singly(trainer: Trainer, comm: Communicator, samples: Sequence[int]) -> Outcome:
    """Contribute the gradient of each microbatch by itself; `samples` are whole ones."""
    unit = trainer.config.microbatch
    accounts: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for first in range(0, len(samples), unit):
        trainer.clear()
        accounts.append(_account(trainer, samples[first : first + unit]))
        gradients.append([bucket.clone() for bucket in trainer.buckets])
    total = torch.zeros(2, dtype=torch.float64)
    outcome = comm.all_reduce(total, reproducible=True, contributions=accounts)
    for number, bucket in enumerate(trainer.buckets):
        comm.all_reduce(bucket, reproducible=True, contributions=[gradient[number] for gradient in gradients])
    return outcome


def _account(trainer: Trainer, samples: Sequence[int]) -> Tensor:
    """Add the gradient of the samples to the buckets; return (sum of the losses, number of tokens)."""
    total = trainer.accumulate(samples, trainer.tokens)
    return torch.tensor([total, len(samples) * trainer.config.context], dtype=torch.float64)
