"""The arithmetic of a step: the same whoever shares the work, and a state that can be handed over whole."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from collectives.errors import UsageError
from collectives.region import split
from collectives.state import state_hash
from launch import data, reference
from launch.config import DType, JobConfig
from launch.trainer import Trainer, one_thread


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text of 61 training windows of 16 tokens, so that runs of 20 steps wrap into further data epochs."""
    path = tmp_path / "text.txt"
    path.write_bytes(data.python_text()[:1030])
    return str(path)


def make(config: JobConfig) -> Trainer:
    return Trainer(config, data.load(config.data, config.context, config.batch))


def tiny(text: str, dtype: DType = "fp32", steps: int = 20) -> JobConfig:
    return JobConfig(preset="tiny", batch=8, context=16, steps=steps, warmup=5, dtype=dtype, data=(text,))


def shared_step(members: Sequence[Trainer]) -> float:
    """Take one step as these members together; return the loss."""
    total = 0.0
    leader = members[0]
    for rank, member in enumerate(members):
        member.clear()
        total += member.accumulate(member.plan.share(leader.step, rank, len(members)), member.tokens)
    for buckets in zip(*(member.buckets for member in members), strict=True):
        reduced = torch.stack(buckets).sum(dim=0)
        for bucket in buckets:
            bucket.copy_(reduced)
    for member in members:
        member.apply()
    return total / leader.tokens


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_losses_do_not_depend_on_who_shares_the_work_and_members_keep_equal_bits(text: str, dtype: DType) -> None:
    config = tiny(text, dtype)
    with one_thread():
        members = [make(config) for _ in range(9)]  # more than samples in a batch
        losses = []
        for step in range(config.steps):
            present = members[: 1 + (step * 5) % 9]
            losses.append(shared_step(present))
            for absent in members[len(present) :]:
                absent.absorb(present[-1].state())
    assert len({state_hash(member.state()) for member in members}) == 1
    comparison = reference.compare(losses, reference.run(config).losses, dtype)
    assert comparison.ok, str(comparison)


def test_the_gradient_is_that_of_the_mean_over_the_batch(text: str) -> None:
    config = tiny(text, "fp64").replace(microbatch=3, buckets=2)
    trainer, other = make(config), make(config)
    samples = trainer.plan.samples(0)
    assert len(trainer.buckets) == 2
    trainer.clear()
    total = trainer.accumulate(samples, trainer.tokens)
    inputs, targets = other.corpus.batch([sample % other.corpus.windows for sample in samples])
    for parameter in other.model.parameters():
        parameter.grad = None
    logits = other.model(inputs)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert total / trainer.tokens == pytest.approx(float(loss.detach()), abs=1e-13)
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)


def test_computing_a_share_moves_nothing_but_the_buckets(text: str) -> None:
    trainer = make(tiny(text))
    before = state_hash(trainer.state())
    for _ in range(2):
        trainer.clear()
        trainer.accumulate(trainer.plan.samples(0), trainer.tokens)
    trainer.evaluate([0])
    assert state_hash(trainer.state()) == before
    trainer.clear()
    assert all(not bucket.any() for bucket in trainer.buckets)


@pytest.mark.parametrize("buckets", [1, 3, 50])
def test_buckets_hold_every_gradient_once(text: str, buckets: int) -> None:
    trainer = make(tiny(text).replace(buckets=buckets))
    assert 1 <= len(trainer.buckets) <= min(buckets, 9)
    assert sum(bucket.numel() for bucket in trainer.buckets) == trainer.model.parameter_count
    for bucket in trainer.buckets:
        bucket.fill_(1)
    for parameter in trainer.model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert bool(parameter.grad.all())


def test_the_gradient_is_clipped_to_its_global_norm(text: str) -> None:
    trainer = make(tiny(text).replace(clip=0.01))
    trainer.clear()
    trainer.accumulate(trainer.plan.samples(0), trainer.tokens)
    trainer.apply()
    assert torch.cat(trainer.buckets).norm() == pytest.approx(0.01, rel=1e-3)


def test_a_joiner_takes_over_the_whole_state(text: str) -> None:
    config = tiny(text)
    veteran = make(config)
    with one_thread():
        for _ in range(3):
            shared_step([veteran])
        torch.randn(5, generator=veteran.generator)
        joiner = make(config.replace(lr=0.5, warmup=1, weight_decay=0.3))
        joiner.absorb(veteran.state())
        assert state_hash(joiner.state()) == state_hash(veteran.state())
        shared_step([veteran])
        shared_step([joiner])
    assert state_hash(joiner.state()) == state_hash(veteran.state())
    assert joiner.step == 4
    own = {tensor.data_ptr() for tensor in veteran.state()["model"].values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in joiner.state()["model"].values())


def test_the_state_knows_the_data_position(text: str) -> None:
    trainer = make(tiny(text))
    for _ in range(8):
        shared_step([trainer])
    windows = trainer.corpus.windows
    assert windows == 61
    assert trainer.state()["data"] == {"epoch": 1, "offset": 3}


def test_the_state_of_another_job_is_refused_by_what_differs(text: str, tmp_path: Path) -> None:
    trainer = make(tiny(text))
    other_text = tmp_path / "other.txt"
    other_text.write_bytes(Path(text).read_bytes().swapcase())
    for config, message in (
        (tiny(text).replace(batch=7, seed=3), r"batch \(7 here, 8 there\), seed \(3 here, 0 there\)"),
        (tiny(str(other_text)), r"text \("),
        (tiny(text, "fp64"), r"dtype \(fp64 here, fp32 there\)"),
    ):
        with pytest.raises(UsageError, match=message):
            make(config).absorb(trainer.state())


def test_one_thread_restores_the_callers_threads() -> None:
    former = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == former


def test_evaluation_is_the_same_however_it_is_divided(text: str) -> None:
    trainer = make(tiny(text, "fp64"))
    windows = range(trainer.corpus.validation_windows)
    assert len(windows) == 3
    whole = trainer.evaluate(windows)
    parts = sum(trainer.evaluate(windows[start:stop]) for start, stop in split(len(windows), 2))
    assert parts == pytest.approx(whole, abs=1e-10)
