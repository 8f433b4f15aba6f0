"""The gradient of a step: reproducible, its bits do not show the division of the batch; as it comes, they do."""

import torch

from collectives.communicator import Communicator
from launch import data, gradient
from launch.config import JobConfig
from launch.trainer import Trainer, one_thread

UNIT = 3


def bits(reproducible: bool, turn: int) -> tuple[bytes, list[float]]:
    """Buckets, and (loss, tokens), with the whole microbatches of a step in an order that begins with number `turn`."""
    config = JobConfig(preset="tiny", batch=11, context=16, microbatch=UNIT, reproducible=reproducible)
    with one_thread():
        trainer = Trainer(config, data.load((), config.context, config.batch))
        samples = trainer.share(0, 1)
        whole = len(samples) // UNIT * UNIT
        given = samples[turn * UNIT : whole] + samples[: turn * UNIT] + samples[whole:]
        outcome = gradient.reduce(trainer, Communicator.solo(), given)
    assert outcome.result is not None
    assert sorted(given) == sorted(samples)
    return torch.cat(trainer.buckets).numpy().tobytes(), outcome.result.tolist()


def test_a_reproducible_gradient_does_not_depend_on_the_order_of_microbatches() -> None:
    first = bits(True, 0)
    assert first[1][1] == 11 * 16
    assert all(bits(True, turn) == first for turn in (1, 2))


def test_one_that_is_summed_as_it_comes_does() -> None:
    assert any(bits(False, turn)[0] != bits(False, 0)[0] for turn in (1, 2))


def test_members_outnumbering_microbatches_have_no_share() -> None:
    config = JobConfig(preset="tiny", batch=4, context=16, microbatch=2, reproducible=True)
    with one_thread():
        trainer = Trainer(config, data.load((), config.context, config.batch))
        assert [len(trainer.share(rank, 3)) for rank in range(3)] == [2, 2, 0]
        outcome = gradient.reduce(trainer, Communicator.solo(), [])
    assert outcome.result is not None
    assert outcome.result.tolist() == [0.0, 0.0]
    assert not any(bucket.any() for bucket in trainer.buckets)


def test_the_size_of_a_microbatch_is_part_of_a_reproducible_job() -> None:
    config = JobConfig(preset="tiny", batch=4, context=16, microbatch=2)
    corpus = data.load((), config.context, config.batch)
    assert "microbatch" not in Trainer(config, corpus).state()["job"]
    assert Trainer(config.replace(reproducible=True), corpus).state()["job"]["microbatch"] == 2
