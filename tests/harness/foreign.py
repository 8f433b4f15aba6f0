"""Runs scripts with the libraries whose checkpoints are converted.

Torch is that of this environment, DeepSpeed and Megatron-Core are in the one that `dev.py test` makes beside it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness.cluster import ROOT

FOREIGN = Path(os.environ.get("RINGHOLD_FOREIGN", ROOT / ".venv-foreign")) / "bin" / "python"
RINGHOLD = [sys.executable, "-m", "launch.cli"]
_PATIENCE = 400.0
"""Seconds that a launch may take on a machine that is busy; alone it takes a tenth."""


def environment() -> dict[str, str]:
    """Environment variables for these libraries."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def run(python: str | Path, *arguments: str | Path, ranks: int = 0) -> Any:
    """Run a module with its arguments, as `ranks` ranks of torchrun if that is not 0; return the JSON that it prints.

    Fails the test if it ends otherwise than well, with what it said.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    child = subprocess.Popen(
        [python, *launcher, "-m", *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=_PATIENCE)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.returncode == 0, said[-4000:]
    (found,) = [line for line in said.splitlines() if line.startswith(('{"', '[{"'))]
    return json.loads(found)
