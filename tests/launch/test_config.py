"""The job's settings: through JSON and back, and refused with a reason."""

from pathlib import Path

import pytest

from collectives.errors import UsageError
from launch.config import JobConfig


def test_json_round_trip(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x")
    config = JobConfig(preset="tiny", steps=7, lr=1.5e-3, dtype="fp64", data=(str(text),), out=str(tmp_path))
    assert JobConfig.from_json(config.to_json()) == config
    assert JobConfig.from_json("{}") == JobConfig()
    assert config.replace(steps=9).steps == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps has to be at least 1, not 0"),
        ({"batch": -1}, "batch has to be at least 1"),
        ({"warmup": -1}, "warmup has to be at least 0"),
        ({"lr": 0.0}, "lr has to be a positive number"),
        ({"lr": float("nan")}, "lr has to be a positive number"),
        ({"clip": float("inf")}, "clip has to be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay has to be 0 or more"),
        ({"decay_steps": 0}, "decay_steps has to be at least 1"),
        ({"seed": 1 << 63}, "seed has to be less than"),
        ({"preset": "2m"}, "preset is one of tiny, 1m, 10m, 100m, not '2m'"),
        ({"dtype": "fp16"}, "dtype is one of fp32, fp64"),
        ({"data": ("/no/such/text",)}, "/no/such/text does not exist"),
        ({"data": ("/tmp",)}, "/tmp is a folder"),
        ({"resume": "/no/such/final.safetensors"}, "resume has to be a file or a store"),
    ],
)
def test_bad_settings_are_refused_with_a_reason(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        JobConfig().replace(**changes)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not the JSON of a training job"),
        ("[1]", "not the JSON of a training job"),
        ('{"step": 3}', "a job has no setting 'step'"),
        ('{"steps": "3"}', "Expected `int`"),
        ('{"steps": 0}', "at least 1"),
    ],
)
def test_bad_json_is_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        JobConfig.from_json(text)
