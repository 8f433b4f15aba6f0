"""The reference run and the comparison with it, which has to be able to fail."""

import math
from pathlib import Path

import pytest

from collectives.errors import UsageError
from launch import data, reference
from launch.config import DType, JobConfig
from launch.reference import Reference, compare


def tiny(dtype: DType = "fp32", **values: object) -> JobConfig:
    return JobConfig(preset="tiny", batch=8, context=16, steps=8, warmup=3, dtype=dtype).replace(**values)


def test_the_reference_learns_and_is_repeatable() -> None:
    told: list[tuple[int, float]] = []
    config = tiny(steps=40, lr=3e-3)
    first = reference.run(config, lambda step, loss: told.append((step, loss)))
    assert first.losses == reference.run(config).losses
    assert first.first_step == 0
    assert told == list(enumerate(first.losses, 1))
    assert first.losses[-1] < first.losses[0] - 1


def test_losses_within_the_tolerance_are_accepted() -> None:
    expected = [5.0, 4.0, 3.0]
    comparison = compare([5.0, 4.0 + 9e-6, 3.0], expected, "fp32")
    assert comparison.ok
    assert (comparison.steps, comparison.worst_step) == (3, 1)
    assert comparison.worst == pytest.approx(9e-6)
    assert "3 losses within 9.0e-06 of the reference" in str(comparison)


@pytest.mark.parametrize(
    ("losses", "dtype", "first_bad"),
    [
        ([5.0, 4.0 + 1.1e-5, 3.1], "fp32", 1),
        ([5.0, 4.0, 3.0 + 2e-12], "fp64", 2),
        ([5.0, 4.0], "fp32", 2),
        ([5.0, 4.0, 3.0, 2.0], "fp32", 3),
        ([math.nan, 4.0, 3.0], "fp32", 0),
        ([5.0, math.inf, 3.0], "fp32", 1),
        ([], "fp32", 0),
    ],
)
def test_losses_beyond_it_missing_or_no_numbers_are_refused(losses: list[float], dtype: DType, first_bad: int) -> None:
    comparison = compare(losses, [5.0, 4.0, 3.0], dtype)
    assert not comparison.ok
    assert comparison.first_bad_step == first_bad
    assert f"from step {first_bad} on" in str(comparison)


def test_nothing_compared_is_nothing_proven() -> None:
    assert not compare([], [], "fp32").ok


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("members", [2, 4, 50])
def test_the_control_is_refused_although_its_first_losses_are_right(dtype: DType, members: int) -> None:
    config = tiny(dtype)
    undisturbed = reference.run(config)
    comparison = reference.control(config, undisturbed, members)
    assert not comparison.ok
    assert comparison.steps == reference.CONTROL_STEPS
    assert comparison.first_bad_step is not None
    assert comparison.first_bad_step >= 2
    assert 10 * comparison.tolerance < comparison.worst < 1


def test_the_control_needs_two_members_and_some_steps() -> None:
    config = tiny()
    undisturbed = reference.run(config)
    with pytest.raises(UsageError, match="2 members"):
        reference.control(config, undisturbed, members=1)
    with pytest.raises(UsageError, match="3 steps"):
        reference.control(config, Reference(0, undisturbed.losses[:2], 0.0, ""))


def test_unusable_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(data.python_text()[:50])
    with pytest.raises(UsageError, match=r"short\.txt"):
        reference.run(tiny(data=(str(path),)))
