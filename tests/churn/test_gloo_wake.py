"""Gloo never wakes whoever waits for an operation whose bytes are half way; `gloo_wake` must."""

import subprocess
import sys
from pathlib import Path

import pytest

from collectives.transports.gloo_wake import can_wake

SCRIPT = Path(__file__).with_name("half_way.py")


@pytest.mark.parametrize("direction", ["recv", "send"])
def test_a_wait_for_half_of_the_bytes_ends_with_false_at_once_and_ever_after(direction: str, tmp_path: Path) -> None:
    assert can_wake()
    run = subprocess.run(
        [sys.executable, SCRIPT, direction, tmp_path], capture_output=True, text=True, timeout=50, check=False
    )
    assert (run.returncode, run.stdout.split()) == (0, ["False", "False"]), run.stderr
